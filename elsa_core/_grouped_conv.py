"""The operator ``elsa::grouped_conv``, with kernels for CUDA in the extension.

This file has the default kernels in plain PyTorch, autograd, autocast and the fake kernels. Use
`elsa_core.grouped_conv`, which calls the operator where its kernels serve.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._problem import is_cast
from .operator import AUTOCAST, _autocast, _autograd

KERNEL_SIZE, GROUP_WIDTHS, MOST = 7, (4, 8), 2**26
"""What the CUDA kernels serve; height and width * channels must be at most MOST."""


def _compiled_for() -> list[int]:
    """Return the compute capabilities that the extension's kernels are compiled for; 800 is 8.0.

    Earlier ones are left out: for them the kernels are compiled to nothing.
    """
    if not hasattr(torch.ops.elsa, "grouped_conv"):  # there is no extension
        return []
    if not torch._C._dispatch_has_kernel_for_dispatch_key("elsa::grouped_conv", "CUDA"):
        return []
    names = torch.ops.elsa.cuda_architectures().split(",")
    return [int(name) for name in names if int(name) >= 800]


_capabilities = _compiled_for()


def has_cuda_kernels() -> bool:
    """Whether the extension has kernels for CUDA, compiled for a device that can run them."""
    return bool(_capabilities)


def serves_device(device: torch.device) -> bool:
    """Whether the CUDA kernels are compiled for a device, or for an earlier one from 8.0 on."""
    if device.type != "cuda" or not _capabilities:
        return False
    properties = torch.cuda.get_device_properties(device)
    return min(_capabilities) <= 100 * properties.major + 10 * properties.minor


def is_served(query: Tensor, key: Tensor, weight: Tensor) -> bool:
    """Whether the CUDA kernels serve these tensors, as autocast would cast weight and bias."""
    dtype = query.dtype
    if dtype not in (torch.float16, torch.bfloat16) or not serves_device(query.device):
        return False
    if torch.is_autocast_enabled("cuda"):
        if torch.get_autocast_dtype("cuda") != dtype or not is_cast(weight.dtype):
            return False
    elif weight.dtype != dtype:
        return False
    channels, group_width, *kernel = weight.shape
    return (
        key.dtype == dtype
        and kernel == [KERNEL_SIZE, KERNEL_SIZE]
        and group_width in GROUP_WIDTHS
        and channels % 8 == 0
        and max(query.shape[1], query.shape[2] * channels) <= MOST
    )


def check(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor | None = None,
) -> None:
    """Raise ValueError for shapes or devices that do not match, TypeError for dtypes."""
    if query.dim() != 4 or weight.dim() != 4 or weight.shape[0] != query.shape[-1]:
        raise ValueError(
            "elsa::grouped_conv needs query [B, H, W, C] and weight [C, width, K, K], got "
            f"{list(query.shape)} and {list(weight.shape)}"
        )
    channels, group_width, *kernel = weight.shape
    if group_width < 1 or channels % group_width or kernel[0] != kernel[1] or kernel[0] % 2 == 0:
        raise ValueError(
            "elsa::grouped_conv needs weight [C, width, K, K] with C a multiple of width and K "
            f"odd, got {list(weight.shape)}"
        )
    shapes = {"key": query.shape, "weight": weight.shape, "bias": (channels,), "grad": query.shape}
    tensors = {"key": key, "weight": weight, "bias": bias, "grad": grad}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"elsa::grouped_conv needs {name} of shape {list(shapes[name])}, "
                f"got {list(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(
                "elsa::grouped_conv needs all tensors of one dtype, "
                f"got {query.dtype} for query and {tensor.dtype} for {name}"
            )
        if tensor.device != query.device:
            raise ValueError(
                "elsa::grouped_conv needs all tensors on one device, "
                f"got {query.device} for query and {tensor.device} for {name}"
            )


def grouped_conv(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``elsa::grouped_conv``: the grouped convolution of query * key, [B, H, W, C] each.

    The weight is [C, C / groups, K, K] with K odd, the bias [C]; zeros pad the maps by K // 2.
    """
    check(query, key, weight, bias)
    x, padding, groups = (query * key).movedim(-1, 1), weight.shape[-1] // 2, _groups(weight)
    out = F.conv2d(x, weight, bias, padding=padding, groups=groups)
    return out.movedim(1, -1).contiguous()


def grouped_conv_backward(
    grad: Tensor, query: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``elsa::grouped_conv_backward``: gradients of query, key, weight and bias.

    The gradient of a bias that is None is empty.
    """
    check(query, key, weight, bias, grad)
    padding, wanted = [weight.shape[-1] // 2] * 2, [True, True, bias is not None]
    grad_product, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad.movedim(-1, 1),
        (query * key).movedim(-1, 1),
        weight,
        [len(weight)],
        [1, 1],
        padding,
        [1, 1],
        False,
        [0, 0],
        _groups(weight),
        wanted,
    )
    grad_product = grad_product.movedim(1, -1)
    grad_maps = ((grad_product * factor).contiguous() for factor in (key, query))
    return (
        *grad_maps,
        grad_weight.contiguous(),
        weight.new_empty(0) if bias is None else grad_bias,
    )


def _groups(weight: Tensor) -> int:
    return weight.shape[0] // weight.shape[1]


def _fake(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check(query, key, weight, bias)
    return query.new_empty(query.shape)


def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    check(query, key, weight, bias, grad)
    tensors = (query, key, weight, bias)
    return tuple(grad.new_empty(0 if t is None else t.shape) for t in tensors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = torch.ops.elsa.grouped_conv_backward(grad, *tensors)
    return tuple(
        g if tensor is not None and needed else None
        for g, tensor, needed in zip(grads, tensors, ctx.needs_input_grad, strict=True)
    )


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "elsa::grouped_conv is differentiable once: choose ELSA_CONVOLUTION=torch or dense for a "
        "double backward"
    )


def _register(library: torch.library.Library) -> None:
    for function in (grouped_conv, grouped_conv_backward):
        name = function.__name__
        if not hasattr(torch.ops.elsa, name):  # there is no extension
            schema = torch.library.infer_schema(function, mutates_args=())
            library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl(name, function, "CompositeExplicitAutograd")
    for device_type in AUTOCAST:
        kernel = _autocast("grouped_conv", device_type)
        library.impl("grouped_conv", kernel, f"Autocast{device_type.upper()}")
    torch.library.register_fake("elsa::grouped_conv", _fake, lib=library)
    torch.library.register_fake("elsa::grouped_conv_backward", _backward_fake, lib=library)
    for name, backward, setup_context in (
        ("grouped_conv", _backward, _setup_context),
        ("grouped_conv_backward", _refuse_double_backward, None),
    ):
        library.impl(name, _autograd(name, backward, setup_context), "Autograd", with_keyset=True)


_library = torch.library.Library("elsa", "FRAGMENT")
_register(_library)
