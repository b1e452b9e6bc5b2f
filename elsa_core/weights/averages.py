"""Tell the averaged weights of a checkpoint from those that the optimizer left.

A checkpoint of a training that averages its weights has the averaged ones in its usual place, as
MMEngine's EMAHook writes it, and the others, from which the training continues, under `BESIDE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BESIDE = "ema_state_dict"
_PREFIX = "module."


def beside(state: Mapping[str, Any], **count: Any) -> dict[str, Any]:
    """Return the entry `BESIDE` for the weights ``state`` of a model."""
    return {**count, **{f"{_PREFIX}{name}": value for name, value in state.items()}}


def trained(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights that the optimizer left, from the entry `BESIDE` of a checkpoint."""
    entry = checkpoint[BESIDE].items()
    return {n[len(_PREFIX) :]: value for n, value in entry if str(n).startswith(_PREFIX)}


def has_both(checkpoint: Any) -> bool:
    """Whether a checkpoint holds averaged weights and those that the optimizer left."""
    return isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(BESIDE), Mapping)


def note(path: str, *, averaged: bool) -> str:
    """Return a sentence on which weights of a checkpoint with both are read."""
    taken = "averaged ones" if averaged else "optimizer's"
    return f"{path} holds averaged (EMA) weights and the optimizer's: the {taken} are read"
