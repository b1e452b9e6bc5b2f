"""At inference on the CPU the heads compute otherwise, and the same as MMDetection's own."""

import pytest
import torch

pytest.importorskip("mmdet")

from mmengine.registry import MODELS, DefaultScope

EXTRACTOR = dict(
    roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0),
    out_channels=4,
    featmap_strides=[4, 8, 16, 32],
)
HEAD = dict(num_convs=2, in_channels=4, conv_out_channels=4, num_classes=3)


def ours_and_stock(ours, stock, options):
    with DefaultScope.overwrite_default_scope("mmdet"):
        first = MODELS.build({"type": f"elsa_mm.detection.{ours}", **options}).eval()
        second = MODELS.build({"type": stock, **options}).eval()
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("count", [0, 100])
def test_pooled_boxes_are_those_of_mmcv(images, count):
    ours, stock = ours_and_stock("Float32RoIExtractor", "SingleRoIExtractor", EXTRACTOR)
    torch.manual_seed(0)
    maps = tuple(torch.randn(images, 4, 96 // 2**level, 128 // 2**level) for level in range(4))
    corner, extent = torch.rand(count, 2) * 300, torch.rand(count, 2) ** 3 * 450
    rois = torch.cat([torch.randint(0, images, (count, 1)), corner, corner + extent], 1)
    expected = stock(maps, rois)
    torch.testing.assert_close(ours(maps, rois), expected, rtol=1e-5, atol=1e-5)
    trained = tuple(level.requires_grad_() for level in maps)
    assert torch.equal(ours(trained, rois), expected)


def test_channels_last_maps_are_pooled_right():
    """mmcv reads such maps as if they were contiguous."""
    ours, stock = ours_and_stock("Float32RoIExtractor", "SingleRoIExtractor", EXTRACTOR)
    maps = tuple(torch.randn(1, 4, 64 // 2**level, 64 // 2**level) for level in range(4))
    rois = torch.tensor([[0.0, 8.0, 16.0, 96.0, 144.0], [0.0, 0.0, 0.0, 250.0, 200.0]])
    turned = tuple(level.contiguous(memory_format=torch.channels_last) for level in maps)
    torch.testing.assert_close(ours(turned, rois), stock(maps, rois), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 5])
def test_mask_logits_are_those_of_the_stock_head(count):
    ours, stock = ours_and_stock("FastMaskHead", "FCNMaskHead", HEAD)
    x = torch.randn(count, 4, 14, 14)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x))
    assert torch.equal(ours(x), stock(x)) and ours(x).requires_grad
