"""RoIAlign as a sum of pixels beside torchvision's; a mask head's layers beside PyTorch's."""

import pytest
import torch
from torch import nn

from elsa_core import mask_head
from elsa_core.linear import Linear, fast_linear
from elsa_core.roi_align import is_fast, roi_align

torchvision = pytest.importorskip("torchvision")


def some_boxes(count):
    """Boxes in, across and outside an image of 96 x 128, of all sizes, also empty and inverted."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 160 - 32
    extent = torch.rand(count, 2, generator=generator) ** 3 * 140 - 1
    return torch.cat([corner, corner + extent], 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("size", "sampling_ratio"), [(7, 0), (14, 0), (7, 2), (1, 3)])
def test_bins_are_those_of_torchvision(layout, images, size, sampling_ratio):
    torch.manual_seed(0)
    feature = torch.randn(images, 5, 24, 32).contiguous(memory_format=layout)
    boxes, image = some_boxes(1500), torch.randint(0, images, (1500,))
    rois = torch.cat([image[:, None].float(), boxes], 1)
    expected = torchvision.ops.roi_align(feature, rois, size, 0.25, sampling_ratio, True)
    bins = roi_align(feature, boxes, image, 0.25, size, sampling_ratio)
    assert bins.shape == expected.shape and bins.abs().max() > 1
    torch.testing.assert_close(bins, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_few_boxes(count):
    boxes = torch.tensor([[500.0, 500.0, 600.0, 600.0]])[:count]
    bins = roi_align(torch.randn(1, 3, 8, 8), boxes, torch.zeros(count, dtype=torch.int64), 1, 7, 0)
    assert bins.shape == (count, 3, 7, 7) and not bins.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_boxes_that_are_not_finite_give_zeros(value):
    boxes = torch.tensor([[1.0, 1.0, value, 6.0], [1.0, 1.0, 5.0, 6.0]])
    bins = roi_align(torch.ones(1, 3, 8, 8), boxes, torch.zeros(2, dtype=torch.int64), 1, 7, 0)
    torch.testing.assert_close(bins, torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 7, 7))


def test_gradients_need_another_kernel():
    feature, boxes = torch.randn(1, 3, 8, 8, requires_grad=True), some_boxes(2)
    assert not is_fast(feature, boxes) and is_fast(feature.detach(), boxes)
    assert not is_fast(feature.detach().half(), boxes)
    with torch.no_grad():
        assert is_fast(feature, boxes)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("count", [0, 4])
def test_mask_logits_are_those_of_the_layers(stride, count):
    deconv, predictor = nn.ConvTranspose2d(6, 5, stride, stride), nn.Conv2d(5, 7, 1)
    x = torch.randn(count, 6, 3, 4)
    assert not mask_head.is_fast(x, deconv, predictor)
    with torch.no_grad():
        assert mask_head.is_fast(x, deconv, predictor) == bool(count)
        expected = predictor(deconv(x).relu())
        torch.testing.assert_close(mask_head.logits(x, deconv, predictor), expected)


@pytest.mark.parametrize(
    "other", [nn.ConvTranspose2d(6, 5, 3, 2), nn.ConvTranspose2d(6, 5, 2, 2, groups=1, padding=1)]
)
def test_other_layers_of_a_mask_head_are_left_alone(other):
    with torch.no_grad():
        assert not mask_head.is_fast(torch.randn(1, 6, 3, 4), other, nn.Conv2d(5, 7, 1))
        assert not mask_head.is_fast(torch.randn(1, 6, 3, 4), None, nn.Conv2d(5, 7, 1))


def test_fast_linear_keeps_the_parameters():
    layer = nn.Linear(3, 4, bias=False).eval()
    fast = fast_linear(layer)
    assert type(fast) is Linear and fast.weight is layer.weight and fast.bias is None
    assert not fast.training
