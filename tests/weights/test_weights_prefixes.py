"""Checkpoints of compiled, sharded and wrapped models."""

import pytest
import torch
from weights_models import KINDS, detector

from elsa_core.runtime.errors import UsageError
from elsa_core.weights import convert, recognise


def same(checkpoint, kind, to="detectron2"):
    found, wanted = (convert(recognise(one), to) for one in (checkpoint, detector(kind)))
    assert list(found.tensors) == list(wanted.tensors)
    for name, tensor in wanted.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    return found


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "net.detector.", "module._orig_mod."])
@pytest.mark.parametrize("kind", KINDS)
def test_prefixes(kind, prefix):
    tensors = {prefix + name: tensor for name, tensor in detector(kind).items()}
    assert not same({"state_dict": tensors}, kind).dropped
    same(tensors, kind, "backbone")


def test_compiled_and_sharded_parts():
    tensors = {}
    for name, tensor in detector("upernet").items():
        name = name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.")
        tensors[name.replace("backbone.", "backbone._orig_mod._fsdp_wrapped_module.")] = tensor
    same(tensors, "upernet")


def test_what_lies_beside_the_model_is_accounted_for():
    tensors = {f"model.{name}": tensor for name, tensor in detector("upernet").items()}
    found = same({**tensors, "criterion.weight": torch.ones(3)}, "upernet")
    reason = "outside of model., with which the model's names begin"
    assert found.dropped == [("criterion.weight", reason)]


def test_several_models_are_refused():
    both = {f"{who}.{name}": t for who in "ba" for name, t in detector("upernet").items()}
    with pytest.raises(UsageError, match="it holds several models, with the prefixes a., b."):
        recognise(both)
