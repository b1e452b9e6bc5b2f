"""Check tensors for NaN and infinity.

Separate from `finite`, whose import of TorchDynamo takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .errors import UsageError


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor has NaN or infinity. Synchronizes with the device once."""
    parts = [part for part in map(_local, tensors) if part.numel() and part.is_floating_point()]
    if not parts:
        return True
    # The maximum norm propagates NaN and infinity and cannot overflow.
    checks = [torch.linalg.vector_norm(part, math.inf).isfinite() for part in parts]
    return bool(torch.stack([check.to(checks[0].device) for check in checks]).all())


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UsageError, naming ``where``, if a tensor has NaN or infinity."""
    if not all_finite(tensors.values()):
        name = next(name for name, tensor in tensors.items() if not all_finite([tensor]))
        raise UsageError(f"{where} holds NaN or infinity in {name}")


def _local(tensor: Tensor) -> Tensor:
    """Return the local shard of a distributed tensor, in a dtype that has norms."""
    tensor = tensor.detach()
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.float() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor
