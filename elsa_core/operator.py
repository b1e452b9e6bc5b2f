"""Enhanced local self-attention (arXiv 2112.12786) as a PyTorch operator.

The compiled kernels register themselves, those in Python in `backends`. This file has the front end
and the parts shared by all devices: default kernels, autograd, autocast and the fake kernels for
torch.compile.
"""

from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd.forward_ad import unpack_dual

from . import _fallback, backends
from ._extension import INSTALL, binaries, load_extension
from ._problem import check_problem, is_cast

__all__ = ["elsa_attention", "has_extension"]

AUTOCAST = ("cpu", *backends.GPUS)
"""Devices on which autocast changes the type of the tensors."""
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
    """Enhanced local self-attention with ghost filters, differentiable once, in reverse mode.

    ``elsa_attention_reference`` has the same signature and defines the result.

    Args:
        value: [B, H, W, C] of a floating-point type, the channels head-major.
        logits: [B, H, W, G * K * K] before the softmax, head-major, then ky, then kx.
        ghost_add: [C, K, K] filters added to the attention, or None for none.
        ghost_mul: [C, K, K] filters that the attention is multiplied by, or None for 1 everywhere.
        kernel_size: K, odd.
        dilation: distance of neighbouring offsets in positions; (K - 1) * dilation must be less
            than 2**31.

    Returns:
        [B, H, W, C], of the type of value (under autocast: of the autocast type).

    Raises:
        ValueError: shapes, kernel_size or dilation do not match.
        TypeError: tensors differ in dtype, are not float32, float64, float16 or bfloat16, or are
            not strided.
        NotImplementedError: forward-mode differentiation, as in ``torch.func.jvp``, or a second
            backward pass.
    """
    device_type = value.device.type
    autocast = None
    if device_type in AUTOCAST and torch.is_autocast_enabled(device_type):
        autocast = torch.get_autocast_dtype(device_type)
    check_problem(value, logits, ghost_add, ghost_mul, kernel_size, dilation, autocast=autocast)
    return torch.ops.elsa.attention(value, logits, ghost_add, ghost_mul, kernel_size, dilation)


def _define(library: torch.library.Library) -> None:
    """Define the schema of csrc/elsa.cpp, or see that the extension has the same.

    Raises:
        ImportError: the extension was built from other sources.
    """
    for name in ("attention", "attention_backward"):
        schema = name + torch.library.infer_schema(getattr(_fallback, name), mutates_args=())
        if not has_extension:
            library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        elif str(getattr(torch.ops.elsa, name).default._schema) != f"elsa::{schema}":
            raise ImportError(
                f"{binaries()[0]} was built from other sources than those beside it: build it "
                f"again by '{INSTALL}'"
            )


def _attention_fake(value: Tensor, *problem: Any) -> Tensor:
    check_problem(value, *problem)
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _backward_fake(
    grad: Tensor,
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None,
    ghost_mul: Tensor | None,
    kernel_size: int,
    dilation: int,
    ghost_gradients: bool = True,
) -> tuple[Tensor, ...]:
    check_problem(value, logits, ghost_add, ghost_mul, kernel_size, dilation, grad=grad)

    def like(tensor: Tensor | None, wanted: bool = True) -> Tensor:
        if tensor is None or not wanted:
            return grad.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return like(value), like(logits), *(like(g, ghost_gradients) for g in (ghost_add, ghost_mul))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel_size, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _attention_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    options = ctx.kernel_size, ctx.dilation, any(ctx.needs_input_grad[2:4])
    grads = torch.ops.elsa.attention_backward(grad, *tensors, *options)
    wanted = [
        g if tensor is not None and needed else None
        for g, tensor, needed in zip(grads, tensors, ctx.needs_input_grad, strict=False)
    ]
    return (*wanted, None, None)


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("elsa::attention is differentiable once: it has no double backward")


def _autograd(name: str, backward: Any, setup_context: Any) -> Any:
    """Variant of ``torch.library.register_autograd`` that refuses tangents, which that drops."""
    operator = getattr(torch.ops.elsa, name).default
    kernel = make_autograd_impl(operator, Info(backward, setup_context))

    def refuse_tangents(keyset: Any, *inputs: Any) -> Any:
        for tensor in inputs:
            if isinstance(tensor, Tensor) and unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(
                    f"elsa::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, "
                    "linearize, torch.autograd.forward_ad): differentiate in reverse mode"
                )
        return kernel(keyset, *inputs)

    return refuse_tangents


def _autocast(name: str, device_type: str) -> Any:
    operator = getattr(torch.ops.elsa, name).default
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")

    def kernel(*inputs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and is_cast(value.dtype) else value

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operator(*map(cast, inputs))

    return kernel


def _register(library: torch.library.Library) -> None:
    _define(library)
    library.impl("attention", _fallback.attention, "CompositeExplicitAutograd")
    library.impl("attention_backward", _fallback.attention_backward, "CompositeExplicitAutograd")
    for device_type in AUTOCAST:
        library.impl(
            "attention", _autocast("attention", device_type), f"Autocast{device_type.upper()}"
        )
    torch.library.register_fake(_ATTENTION, _attention_fake, lib=library)
    torch.library.register_fake(_BACKWARD, _backward_fake, lib=library)
    for name, backward, setup_context in (
        ("attention", _attention_autograd, _setup_context),
        ("attention_backward", _refuse_double_backward, None),
    ):
        library.impl(name, _autograd(name, backward, setup_context), "Autograd", with_keyset=True)


_library = torch.library.Library("elsa", "FRAGMENT")
_register(_library)
backends.choose_from_environment()
