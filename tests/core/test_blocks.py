"""Patch embedding and merging, MLP, stochastic depth and blocks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elsa_core.blocks import MLP, Block, DropPath, PatchEmbed, PatchMerging


@pytest.mark.parametrize("size", [(8, 12), (5, 11), (1, 1)])
def test_patch_embed_pads_bottom_and_right(size):
    torch.manual_seed(0)
    layer = PatchEmbed(3, 8)
    image = torch.randn(2, 3, *size)
    height, width = (math.ceil(length / 4) for length in size)
    padded = torch.zeros(2, 3, 4 * height, 4 * width)
    padded[:, :, : size[0], : size[1]] = image
    patches = padded.reshape(2, 3, height, 4, width, 4)
    expected = torch.einsum("bchiwj,dcij->bhwd", patches, layer.proj.weight) + layer.proj.bias
    torch.testing.assert_close(layer(image), layer.norm(expected), atol=1e-5, rtol=1e-5)


def test_patch_merging_concatenates_rows_before_columns_and_pads_odd_maps():
    layer = PatchMerging(1)
    layer.norm = nn.Identity()
    layer.reduction = nn.Identity()
    merged = layer(torch.arange(24.0).reshape(1, 4, 6, 1))
    assert merged.shape == (1, 2, 3, 4)
    assert merged[0, 1, 2].tolist() == [16, 22, 17, 23]
    merged = layer(torch.arange(1.0, 10.0).reshape(1, 3, 3, 1))
    assert merged[0].tolist() == [[[1, 4, 2, 5], [3, 6, 0, 0]], [[7, 0, 8, 0], [9, 0, 0, 0]]]


def test_mlp_uses_exact_gelu():
    torch.manual_seed(0)
    layer = MLP(6, 24).double()
    x = torch.randn(2, 3, 3, 6, dtype=torch.float64)
    hidden = layer.fc1(x)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(layer(x), layer.fc2(hidden))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = DropPath(0.25)
    out = layer(torch.ones(4000, 2, 2, 3)).flatten(1)
    kept = out[:, 0] != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert (out[kept] == out.new_tensor(1 / 0.75)).all()
    assert (out[~kept] == 0).all()


def test_drop_path_is_the_identity_in_evaluation_and_at_rate_zero():
    x = torch.randn(3, 2, 2, 4)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_block_is_pre_norm_residual():
    torch.manual_seed(0)
    attn = nn.Linear(8, 8)
    block = Block(8, attn)
    x = torch.randn(2, 3, 4, 8)
    middle = x + attn(F.layer_norm(x, (8,)))
    expected = middle + block.mlp(F.layer_norm(middle, (8,)))
    torch.testing.assert_close(block(x), expected)
    block = Block(8, attn, drop_path=1 - 1e-9)
    assert torch.equal(block(x), x)
