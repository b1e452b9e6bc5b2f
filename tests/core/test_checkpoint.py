"""An original backbone state dict loads strictly, and nothing else slips through."""

import copy

import pytest
import torch
from torch import nn

from elsa_core import ELSASwin
from elsa_core.checkpoint import drop_unused_keys

ARCH = {"embed_dim": 8, "depths": (1, 1, 2), "num_heads": (1, 2, 2), "group_width": 4}
ALL = (0, 1, 2)


@pytest.fixture
def original():
    """A state dict with everything that the original stores."""
    state_dict = ELSASwin(ARCH, out_indices=ALL).state_dict()
    for block in (0, 1):
        state_dict[f"layers.2.blocks.{block}.attn.relative_id"] = torch.arange(2401)
    state_dict["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    return state_dict


def test_bookkeeping_buffers_are_not_part_of_ours():
    assert not [key for key in ELSASwin(ARCH, out_indices=ALL).state_dict() if "relative" in key]


def test_original_loads_strictly(original):
    keys = list(original)
    model = ELSASwin(ARCH, out_indices=ALL)
    assert not torch.equal(model.patch_embed.proj.weight, original["patch_embed.proj.weight"])
    buffer = model.layers[2].blocks[0].attn.relative_id.clone()
    model.load_state_dict(original, strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, original[key]), key
    assert torch.equal(model.layers[2].blocks[0].attn.relative_id, buffer)
    assert list(original) == keys, "the caller's dict stays as it was"


def test_fewer_outputs_drop_the_norms_of_the_others(original):
    model = ELSASwin(ARCH, out_indices=(1,))
    model.load_state_dict(original, strict=True)
    assert torch.equal(model.norm1.weight, original["norm1.weight"])


@pytest.mark.parametrize("last, unused", [(0, 52), (1, 32)])
def test_stages_that_are_not_built_are_dropped_with_a_word(original, last, unused, caplog):
    model = ELSASwin(ARCH, out_indices=(last,))
    model.load_state_dict(original, strict=True)
    assert len(model.layers) == last + 1 and model.layers[last].downsample is None
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())
    (line,) = caplog.messages
    assert line.startswith(f"{unused} tensors of a checkpoint are not used: they come after stage")
    model.load_state_dict(model.state_dict(), strict=True)
    assert len(caplog.messages) == 1


def test_copies_load_into_themselves(original):
    model = ELSASwin(ARCH, out_indices=(0, 2))
    duplicate = copy.deepcopy(model)
    before = model.norm0.weight.clone()
    original["norm0.weight"] = before + 1
    duplicate.load_state_dict(original, strict=True)
    assert torch.equal(duplicate.norm0.weight, before + 1)
    assert torch.equal(model.norm0.weight, before)


def test_original_loads_inside_a_detector(original):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = ELSASwin(ARCH, out_indices=(0, 2))
            self.norm1 = nn.LayerNorm(4)

    model = Detector()
    state_dict = {f"backbone.{key}": value for key, value in original.items()}
    with pytest.raises(RuntimeError, match=r"Missing key.*norm1\.weight"):
        model.load_state_dict(state_dict)
    state_dict.update({"norm1.weight": torch.ones(4), "norm1.bias": torch.ones(4)})
    model.load_state_dict(state_dict, strict=True)
    assert torch.equal(model.norm1.bias, torch.ones(4))
    assert torch.equal(model.backbone.norm2.weight, original["norm2.weight"])


@pytest.mark.parametrize(
    "key",
    [
        "norm3.weight",
        "norm.weight",
        "head.weight",
        "relative_id",
        "layers.2.relative_id",
        "layers.2.blocks.0.attn.relative_ids",
        "layers.2.blocks.0.mlp.relative_id",
        "layers.0.blocks.0.attn.qkv.weight",
        "layers.2.downsample.norm.weight",
        "layers.3.blocks.0.norm1.weight",
    ],
)
def test_unknown_keys_are_still_errors(original, key):
    original[key] = torch.ones(1)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ELSASwin(ARCH, out_indices=ALL).load_state_dict(original)


@pytest.mark.parametrize("key", ["norm2.bias", "layers.2.blocks.1.attn.rb"])
def test_missing_keys_are_still_errors(original, key):
    del original[key]
    with pytest.raises(RuntimeError, match="Missing key"):
        ELSASwin(ARCH, out_indices=ALL).load_state_dict(original)


def test_other_prefixes_are_left_alone():
    state_dict = {"neck.norm1.weight": 0, "norm1.weight": 1, "b.norm1.weight": 2, "b.norm2.bias": 3}
    drop_unused_keys(state_dict, "b.", out_indices=(2,), num_stages=4)
    assert state_dict == {"neck.norm1.weight": 0, "norm1.weight": 1, "b.norm2.bias": 3}
