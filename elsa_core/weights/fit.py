"""Check that a checkpoint matches a model, by name and shape."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import nn

from elsa_core.backbone import StagedBackbone
from elsa_core.runtime.errors import UsageError
from elsa_core.volo import ELSAVolo, fit_position

# A checkpoint with a smaller part of the attention weights is of another backbone, even if some
# vectors match by chance. Stock Swin has a quarter of the small variant's.
LEAST_PART = 0.1


def attention_names(model: nn.Module) -> set[str]:
    """Return the names of the attention parameters of a model's backbones."""
    inside = _prefixes(model)
    names = {name for name, _ in model.named_parameters() if ".attn." in name}
    return {name for name in names if name.startswith(inside)} if inside else set()


def has_names_of(model: nn.Module, names: Collection[str]) -> bool:
    """Whether a checkpoint needs no conversion: it has the model's names for all attention
    parameters, and for some outside the backbone, whose names differ between frameworks."""
    wanted, inside = {name for name, _ in model.named_parameters()}, _prefixes(model)
    outside = {name for name in wanted if not name.startswith(inside)} if inside else wanted
    return attention_names(model) <= set(names) and not (outside and outside.isdisjoint(names))


def backbones_of(model: nn.Module) -> list[tuple[str, StagedBackbone]]:
    """Return the ELSA-Swins and ELSA-VOLOs in a model, each with the prefix of its names."""
    named = model.named_modules()
    return [(n and f"{n}.", part) for n, part in named if isinstance(part, StagedBackbone)]


def _is_volo(model: nn.Module) -> bool:
    return any(isinstance(part, ELSAVolo) for _, part in backbones_of(model))


def _prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(prefix for prefix, _ in backbones_of(model))


def fit_positions(model: nn.Module, tensors: MutableMapping[str, Any]) -> None:
    """Resize a checkpoint's position embeddings, in place, to those of the ELSA-VOLOs in a model.

    Their `load_state_dict` does so, too, but frameworks compare shapes before they call it.
    """
    for prefix, part in backbones_of(model):
        if (
            isinstance(part, ELSAVolo)
            and (position := getattr(part, "pos_embed", None)) is not None
        ):
            for name in (f"{prefix}pos_embed", f"module.{prefix}pos_embed"):
                fit_position(tensors, name, position)


def check_names(names: Iterable[Any], path: str) -> None:
    """Raise UsageError if a tensor's name has control characters.

    Frameworks print the names of unexpected tensors, and a terminal would interpret them.
    """
    for name in names:
        if not str(name).isprintable():
            shown = repr(str(name)[:80])
            raise UsageError(
                f"among the tensors of {path}, {shown} has control characters in its name"
            )


def coverage(model: nn.Module, given: Collection[str]) -> tuple[str, bool]:
    """Return a text on the part of a model's parameters that a checkpoint has, and whether that is
    enough: at least one parameter, and a tenth of the backbone's attention weights.

    Args:
        given: names of the checkpoint's tensors whose shapes match the model.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    found = sizes.keys() & set(given)
    words = f"{len(found)} of the {len(sizes)} parameters of the model"
    enough = bool(found) or not sizes
    if attention := attention_names(model):
        whole, part = (
            sum(map(sizes.__getitem__, names)) for names in (attention, found & attention)
        )
        family = "ELSA-VOLO" if _is_volo(model) else "ELSA-Swin"
        words += f" and {part / whole:.0%} of the weights of {family}'s attention"
        enough &= part >= LEAST_PART * whole
    return words, enough


def check_complete(
    wanted: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]], path: str
) -> None:
    """Raise UsageError unless a checkpoint has all parameters of a model with the right shapes.

    Args:
        wanted: shapes of the model's parameters by name.
        given: shapes of the checkpoint's tensors by name.
    """
    for name, shape in wanted.items():
        if tuple(given.get(name, shape)) != tuple(shape):
            raise UsageError(
                f"the checkpoint {path} does not match the model, is it of another number of "
                f"classes or another backbone: {name} has the shape {tuple(given[name])} instead "
                f"of {tuple(shape)}"
            )
    if missing := [name for name in wanted if name not in given]:
        raise UsageError(
            f"the checkpoint {path} does not match the model: it lacks {len(missing)} of the "
            f"{len(wanted)} parameters, {missing[0]} for one"
        )
