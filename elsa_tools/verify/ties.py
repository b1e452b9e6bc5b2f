"""Ties between scores, in the order of index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TiesByIndex(TorchDispatchMode):
    """Within it, sorts of PyTorch are stable, those in the frameworks' C++ operators too.

    PyTorch's sort of more than 16 numbers on the CPU orders equal ones as it likes. Both frameworks
    sort proposals by float32 probabilities with it, and of two overlapping boxes with one
    probability the first suppresses the other. Exported detectors take the one of lower index.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.sort.default:
            return _sort(*args, **kwargs)
        return func(*args, **kwargs)


def _sort(x: torch.Tensor, dim: int = -1, descending: bool = False) -> Any:
    sort: Callable[..., Any] = torch.ops.aten.sort.stable
    return sort(x, stable=True, dim=dim, descending=descending)
