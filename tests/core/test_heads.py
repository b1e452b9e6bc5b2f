"""Layers of heads beside PyTorch's own."""

import pytest
import torch
from torch import nn

from elsa_core import heads
from elsa_core.linear import Linear, fast_linear


def test_gradients_need_another_kernel():
    feature, boxes = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(2, 4)
    assert not heads.pools_fast(feature, boxes) and heads.pools_fast(feature.detach(), boxes)
    assert not heads.pools_fast(feature.detach().half(), boxes)
    with torch.no_grad():
        assert heads.pools_fast(feature, boxes)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("count", [0, 4])
def test_mask_logits_are_those_of_the_layers(stride, count):
    deconv, predictor = nn.ConvTranspose2d(6, 5, stride, stride), nn.Conv2d(5, 7, 1)
    x = torch.randn(count, 6, 3, 4)
    assert not heads.upsamples_fast(x, deconv, predictor)
    with torch.no_grad():
        assert heads.upsamples_fast(x, deconv, predictor) == bool(count)
        expected = predictor(deconv(x).relu())
        torch.testing.assert_close(heads.mask_logits(x, deconv, predictor), expected)


@pytest.mark.parametrize(
    "other", [nn.ConvTranspose2d(6, 5, 3, 2), nn.ConvTranspose2d(6, 5, 2, 2, groups=1, padding=1)]
)
def test_other_layers_of_a_mask_head_are_left_alone(other):
    with torch.no_grad():
        assert not heads.upsamples_fast(torch.randn(1, 6, 3, 4), other, nn.Conv2d(5, 7, 1))
        assert not heads.upsamples_fast(torch.randn(1, 6, 3, 4), None, nn.Conv2d(5, 7, 1))


def test_fast_linear_keeps_the_parameters():
    layer = nn.Linear(3, 4, bias=False).eval()
    fast = fast_linear(layer)
    assert type(fast) is Linear and fast.weight is layer.weight and fast.bias is None
    assert not fast.training
