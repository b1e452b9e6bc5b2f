"""Checks of the operator's arguments. csrc/problem.h has the same checks and messages."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Limit of (kernel_size - 1) * dilation. Kernels add it to map sizes and multiply it by channel
# counts in 64 bits, and no map is as large.
MOST_REACH = 2**31 - 1


def check_problem(
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None,
    ghost_mul: Tensor | None,
    kernel_size: int,
    dilation: int,
    *,
    grad: Tensor | None = None,
    autocast: torch.dtype | None = None,
) -> None:
    """Check the arguments of the operator.

    Args:
        value, logits, ghost_add, ghost_mul, kernel_size, dilation: as in ``elsa_attention``.
        grad: [B, H, W, C], or None in the forward pass.
        autocast: dtype that all tensors except float64 ones will be cast to.

    Raises:
        ValueError: wrong shapes, devices, kernel_size or dilation.
        TypeError: wrong dtypes or layouts.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"elsa_attention needs an odd, positive kernel_size, got {kernel_size}")
    if dilation < 1:
        raise ValueError(f"elsa_attention needs a positive dilation, got {dilation}")
    if (kernel_size - 1) * dilation > MOST_REACH:
        raise ValueError(
            f"elsa_attention needs (kernel_size - 1) * dilation of at most {MOST_REACH}, "
            f"got kernel_size {kernel_size} and dilation {dilation}"
        )
    tensors = {"value": value, "logits": logits, "ghost_add": ghost_add, "ghost_mul": ghost_mul}
    for name, tensor in (*tensors.items(), ("grad", grad)):
        if tensor is not None and (tensor.layout != torch.strided or tensor.is_nested):
            kind = "a nested tensor" if tensor.is_nested else tensor.layout
            raise TypeError(f"elsa_attention needs strided tensors, got {kind} for {name}")
    if value.dtype not in DTYPES:
        raise TypeError(
            "elsa_attention needs tensors of float32, float64, float16 or bfloat16, "
            f"got {value.dtype} for value"
        )
    if value.dim() != 4 or logits.dim() != 4 or value.shape[:3] != logits.shape[:3]:
        raise ValueError(
            "elsa_attention needs value [B, H, W, C] and logits [B, H, W, G*K*K] of the same "
            f"B, H, W, got {list(value.shape)} and {list(logits.shape)}"
        )
    channels, taps = value.shape[3], kernel_size**2
    if logits.shape[3] == 0 or logits.shape[3] % taps:
        raise ValueError(
            f"elsa_attention needs logits with a multiple of {taps} channels (kernel_size "
            f"squared), got {logits.shape[3]}"
        )
    heads = logits.shape[3] // taps
    if channels == 0 or channels % heads:
        raise ValueError(
            f"elsa_attention needs value with a multiple of {heads} channels (the heads of the "
            f"logits), got {channels}"
        )
    filters = channels, kernel_size, kernel_size
    _check_like("logits", logits, value, None, autocast)
    _check_like("ghost_add", ghost_add, value, filters, autocast)
    _check_like("ghost_mul", ghost_mul, value, filters, autocast)
    _check_like("grad", grad, value, tuple(value.shape), autocast)


def _check_like(
    name: str,
    tensor: Tensor | None,
    value: Tensor,
    shape: tuple[int, ...] | None,
    autocast: torch.dtype | None,
) -> None:
    if tensor is None:
        return
    if shape is not None and tensor.shape != shape:
        axes = "[B, H, W, C]" if name == "grad" else "[C, K, K]"
        raise ValueError(
            f"elsa_attention needs {name} of shape {axes} = {list(shape)}, got {list(tensor.shape)}"
        )
    if _cast(tensor.dtype, autocast) != _cast(value.dtype, autocast):
        raise TypeError(
            "elsa_attention needs all tensors of one dtype, "
            f"got {value.dtype} for value and {tensor.dtype} for {name}"
        )
    if tensor.device != value.device:
        raise ValueError(
            "elsa_attention needs all tensors on one device, "
            f"got {value.device} for value and {tensor.device} for {name}"
        )


def is_cast(dtype: torch.dtype) -> bool:
    """Whether autocast casts tensors of this dtype."""
    return dtype in DTYPES and dtype != torch.float64


def _cast(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    return autocast if autocast is not None and is_cast(dtype) else dtype
