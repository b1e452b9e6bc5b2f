"""Linear layers with an exact GELU before or after, on the fastest path that PyTorch has.

Eager float32 on the CPU uses oneDNN's matrix product, which PyTorch itself uses only for other
dtypes and compiled models. It applies the GELU while it writes the product, and is a quarter faster
on processors that MKL does not know. Everything else is plain PyTorch: other devices and dtypes,
compilers, tracers, dispatch modes, function transforms and autocast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# Whether a function transform or a dispatch mode is active; neither has a public name.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", None)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gelu_before: bool = False,
    gelu_after: bool = False,
) -> Tensor:
    """[..., C_in] -> [..., C_out] with weight [C_out, C_in] and bias [C_out].

    Args:
        gelu_before: apply the exact GELU to ``x``. The backward pass recomputes it, so that only
            its input is kept.
        gelu_after: apply the exact GELU to the result.
    """
    if not is_fast(x, weight):
        x = F.linear(F.gelu(x) if gelu_before else x, weight, bias)
        return F.gelu(x) if gelu_after else x
    parameters = [weight] if bias is None else [weight, bias]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters)):
        out = _Linear.apply(x, weight, bias, gelu_before)
        return F.gelu(out) if gelu_after else out
    x = F.gelu(x) if gelu_before else x
    return _product(x, weight, bias, "gelu" if gelu_after else "none")


class Linear(nn.Linear):
    """`torch.nn.Linear` computed by `linear`; `forward` takes the same options."""

    def forward(self, input: Tensor, **gelu: bool) -> Tensor:
        return linear(input, self.weight, self.bias, **gelu)


def fast_linear(layer: nn.Linear) -> Linear:
    """Returns a `Linear` with the parameters of ``layer``."""
    fast = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    fast.weight, fast.bias = layer.weight, layer.bias
    return fast.train(layer.training)


def is_fast(x: Tensor, weight: Tensor) -> bool:
    """Whether both are plain float32 on the CPU, and nothing but autograd sees what is computed."""
    return bool(
        _onednn is not None
        and is_plain(x)
        and x.dtype == weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is a tensor on the CPU, and nothing but autograd sees what is computed.

    That is no compiler, tracer, dispatch mode or function transform.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if _transforms_active is None or _dispatch_modes is None:
        return False
    return bool(
        type(x) is Tensor
        and x.device.type == "cpu"
        and not _transforms_active()
        and _dispatch_modes() == 0
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    assert _onednn is not None
    return _onednn(x, weight, bias, then, [], "none" if then == "gelu" else "")


class _Linear(torch.autograd.Function):
    """`linear` without ``gelu_after``; saves its input unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gelu = gelu
        return _product(F.gelu(x) if gelu else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        if torch.is_grad_enabled():  # for second derivatives
            inputs = [t for t, needed in ((x, needs_x), (weight, needs_weight)) if needed]
            if inputs:
                out = F.linear(F.gelu(x) if ctx.gelu else x, weight)
                grads = list(torch.autograd.grad(out, inputs, grad, create_graph=True))
                grad_x = grads.pop(0) if needs_x else None
                grad_weight = grads.pop(0) if needs_weight else None
            return grad_x, grad_weight, grad_bias, None
        if needs_weight:
            factor = F.gelu(x) if ctx.gelu else x
            grad_weight = grad.flatten(0, -2).t() @ factor.flatten(0, -2)
            del factor
        if needs_x:
            grad_x = _product(grad, weight.t(), None)
            if ctx.gelu:
                grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        return grad_x, grad_weight, grad_bias, None
