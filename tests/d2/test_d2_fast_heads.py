"""At inference on the CPU the heads compute otherwise, and the same as Detectron2's own."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead

from elsa_core.linear import Linear
from elsa_d2.modeling.heads import Float32ROIAlign, MMDetBoxHead, MMDetMaskHead


@pytest.mark.parametrize("count", [0, 100])
def test_pooled_boxes_are_those_of_detectron2(count):
    torch.manual_seed(0)
    feature = torch.randn(2, 4, 48, 64)
    corner, extent = torch.rand(count, 2) * 200, torch.rand(count, 2) ** 3 * 250
    rois = torch.cat([torch.randint(0, 2, (count, 1)), corner, corner + extent], 1)
    ours, stock = (kind(7, 0.25, 0, aligned=True) for kind in (Float32ROIAlign, ROIAlign))
    torch.testing.assert_close(ours(feature, rois), stock(feature, rois), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(feature.requires_grad_(), rois), stock(feature, rois))


@pytest.mark.parametrize("count", [0, 5])
def test_mask_logits_are_those_of_the_stock_head(count):
    shape, options = ShapeSpec(channels=4), {"num_classes": 3, "conv_dims": [4, 4, 4]}
    ours, stock = (kind(shape, **options) for kind in (MMDetMaskHead, MaskRCNNConvUpsampleHead))
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(count, 4, 14, 14)
    with torch.no_grad():
        torch.testing.assert_close(ours.layers(x), stock.layers(x))
    assert torch.equal(ours.layers(x), stock.layers(x)) and ours.layers(x).requires_grad


def test_boxes_have_the_features_of_the_stock_head():
    shape = ShapeSpec(channels=4, height=7, width=7)
    options = {"conv_dims": [4], "fc_dims": [8, 8]}
    ours, stock = (kind(shape, **options) for kind in (MMDetBoxHead, FastRCNNConvFCHead))
    assert type(ours.fc1) is Linear and ours.fcs == [ours.fc1, ours.fc2]
    assert [name for name, _ in ours.named_children()] == [
        name for name, _ in stock.named_children()
    ]
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(5, 4, 7, 7)
    torch.testing.assert_close(ours(x), stock(x))
