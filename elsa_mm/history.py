"""The log of a training in its checkpoints, as tensors and plain numbers.

MMEngine saves objects of its own classes, which `torch.load` refuses by default since PyTorch 2.6.
MMEngine 0.10.7 does not allow them: training cannot be resumed, nor a checkpoint be tested. Without
these objects, every version reads the checkpoint.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from elsa_core.weights.unpickle import StandIn

_ARGUMENTS = ("log_history", "count_history", "max_length")


def to_plain(value: Any) -> Any:
    """MMEngine's ``message_hub``, without classes that `torch.load(weights_only=True)` refuses.
    `from_plain` reverses it."""
    if isinstance(value, HistoryBuffer):
        history = (torch.from_numpy(np.array(part)) for part in value.data)
        return dict(zip(_ARGUMENTS, (*history, value.max_length), strict=True))
    if isinstance(value, dict):
        return {key: to_plain(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_plain(one) for one in value)
    if isinstance(value, np.generic):
        return value.item()
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def from_plain(message_hub: Any) -> Any:
    """The ``message_hub`` of a checkpoint as MMEngine takes it, also of older checkpoints."""
    if not isinstance(message_hub, dict) or "log_scalars" not in message_hub:
        return message_hub
    scalars = {key: _buffer(one) for key, one in message_hub["log_scalars"].items()}
    return {**message_hub, "log_scalars": scalars}


def _buffer(value: Any) -> Any:
    if isinstance(value, StandIn):  # a HistoryBuffer, which is read as data
        state = getattr(value, "state", {})
        log, count = (state[f"_{name}"].tensor.numpy() for name in _ARGUMENTS[:2])
        return HistoryBuffer(log, count, state["max_length"])
    if not isinstance(value, dict) or set(value) != set(_ARGUMENTS):
        return value
    log, count = (value[name].cpu().numpy() for name in _ARGUMENTS[:2])
    return HistoryBuffer(log, count, value["max_length"])
