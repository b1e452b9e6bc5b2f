"""Enhanced local self-attention (arXiv 2112.12786) as a PyTorch operator.

The compiled kernels register themselves; this file has the front end and what is written once for
all devices: default kernels, autograd, autocast and the fake kernels that torch.compile sees.
"""

from typing import Any

import torch
from torch import Tensor

from . import _fallback
from ._extension import load_extension

__all__ = ["elsa_attention", "has_extension"]

_ATTENTION, _BACKWARD = "elsa::attention", "elsa::attention_backward"

has_extension: bool = load_extension()
"""Whether the compiled operator is in use."""


def elsa_attention(
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None = None,
    ghost_mul: Tensor | None = None,
    *,
    kernel_size: int,
    dilation: int = 1,
) -> Tensor:
    """Enhanced local self-attention with ghost filters, differentiable once.

    ``elsa_attention_reference`` has the same signature and defines the result.

    Args:
        value: [B, H, W, C] of a floating-point type, the channels head-major.
        logits: [B, H, W, G * K * K] before the softmax, head-major, then ky, then kx.
        ghost_add: [C, K, K] filters added to the attention, or None for none.
        ghost_mul: [C, K, K] filters that the attention is multiplied by, or None for 1 everywhere.
        kernel_size: K, odd.
        dilation: distance of neighbouring offsets in positions.

    Returns:
        [B, H, W, C], of the type of value (under autocast: of the autocast type).

    Raises:
        ValueError: shapes, kernel_size or dilation that do not fit together.
        TypeError: tensors of different types, or not floating-point.
    """
    _check(value, logits, ghost_add, ghost_mul, kernel_size, dilation)
    return torch.ops.elsa.attention(value, logits, ghost_add, ghost_mul, kernel_size, dilation)


def _check(
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None,
    ghost_mul: Tensor | None,
    kernel_size: int,
    dilation: int,
) -> None:
    if value.dim() != 4 or logits.dim() != 4:
        raise ValueError(
            "elsa_attention needs value [B, H, W, C] and logits [B, H, W, G*K*K], "
            f"got shapes {tuple(value.shape)} and {tuple(logits.shape)}"
        )
    if value.shape[:3] != logits.shape[:3]:
        raise ValueError(
            "elsa_attention needs value and logits of the same B, H, W, "
            f"got {tuple(value.shape[:3])} and {tuple(logits.shape[:3])}"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"elsa_attention needs an odd, positive kernel_size, got {kernel_size=}")
    if dilation < 1:
        raise ValueError(f"elsa_attention needs a positive dilation, got {dilation=}")
    channels, taps = value.shape[3], kernel_size**2
    if logits.shape[3] == 0 or logits.shape[3] % taps:
        raise ValueError(
            f"elsa_attention needs logits with a multiple of {taps} channels "
            f"(kernel_size={kernel_size} squared), got {logits.shape[3]}"
        )
    heads = logits.shape[3] // taps
    if channels == 0 or channels % heads:
        raise ValueError(
            f"elsa_attention needs a multiple of {heads} channels in value, a share for each head "
            f"of the logits, got {channels}"
        )
    autocast = torch.is_autocast_enabled(value.device.type)
    others = {"logits": logits, "ghost_add": ghost_add, "ghost_mul": ghost_mul}
    if not value.is_floating_point():
        raise TypeError(f"elsa_attention needs floating-point tensors, got {value.dtype}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if name != "logits" and tensor.shape != (channels, kernel_size, kernel_size):
            raise ValueError(
                f"elsa_attention needs {name} of shape (C, K, K) = "
                f"{(channels, kernel_size, kernel_size)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != value.device:
            raise ValueError(
                f"elsa_attention needs all tensors on one device, got value on {value.device} "
                f"and {name} on {tensor.device}"
            )
        if tensor.dtype != value.dtype and not (autocast and tensor.is_floating_point()):
            raise TypeError(
                f"elsa_attention needs all tensors of one dtype, got {value.dtype} for value "
                f"and {tensor.dtype} for {name}"
            )


def _define(library: torch.library.Library) -> None:
    """The schema of csrc/elsa.cpp, for where no extension brings it."""
    for function in (_fallback.attention, _fallback.attention_backward):
        library.define(
            function.__name__ + torch.library.infer_schema(function, mutates_args=()),
            tags=torch.Tag.pt2_compliant_tag,
        )


def _attention_fake(
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None,
    ghost_mul: Tensor | None,
    kernel_size: int,
    dilation: int,
) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _backward_fake(
    grad: Tensor,
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None,
    ghost_mul: Tensor | None,
    kernel_size: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return value.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return like(value), like(logits), like(ghost_add), like(ghost_mul)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel_size, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _attention_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = torch.ops.elsa.attention_backward(grad, *tensors, ctx.kernel_size, ctx.dilation)
    wanted = [
        g if tensor is not None and needed else None
        for g, tensor, needed in zip(grads, tensors, ctx.needs_input_grad, strict=False)
    ]
    return (*wanted, None, None)


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("elsa::attention is differentiable once: it has no double backward")


def _autocast(device_type: str) -> Any:
    def kernel(
        value: Tensor,
        logits: Tensor,
        ghost_add: Tensor | None,
        ghost_mul: Tensor | None,
        kernel_size: int,
        dilation: int,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.dtype == torch.float64:
                return tensor
            return tensor.to(dtype)

        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))
        ):
            return torch.ops.elsa.attention(
                cast(value), cast(logits), cast(ghost_add), cast(ghost_mul), kernel_size, dilation
            )

    return kernel


def _register(library: torch.library.Library) -> None:
    if not has_extension:
        _define(library)
    library.impl("attention", _fallback.attention, "CompositeExplicitAutograd")
    library.impl("attention_backward", _fallback.attention_backward, "CompositeExplicitAutograd")
    for device_type in ("cpu", "cuda"):
        library.impl("attention", _autocast(device_type), f"Autocast{device_type.upper()}")
    torch.library.register_fake(_ATTENTION, _attention_fake, lib=library)
    torch.library.register_fake(_BACKWARD, _backward_fake, lib=library)
    torch.library.register_autograd(
        _ATTENTION, _attention_autograd, setup_context=_setup_context, lib=library
    )
    torch.library.register_autograd(_BACKWARD, _refuse_double_backward, lib=library)


_library = torch.library.Library("elsa", "FRAGMENT")
_register(_library)
