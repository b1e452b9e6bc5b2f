"""Checks of the operator and of the backbones against double precision on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import ELSASwin, ELSAVolo, elsa_attention, elsa_attention_reference

# Largest error of the operator, relative to the largest number.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# The same for a backbone in float32: by default, GPUs convolve in TF32.
BACKBONE_TOLERANCE = 1e-2
# A small architecture of each family, by the name of its class.
ARCHS: dict[str, dict[str, Any]] = {
    "ELSASwin": dict(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), group_width=8),
    "ELSAVolo": dict(depths=(1, 1, 1, 1), embed_dims=(32, 64), num_heads=(1, 2), stem_dim=8),
}


def check_operator(
    device: torch.device, dtype: torch.dtype, multiplied: bool
) -> tuple[float, float]:
    """Return the errors of the operator's result and gradients, relative to the largest number.

    The reference is computed in double precision on the CPU, at a shape with borders, two heads of
    32 channels and an incomplete vector.

    Args:
        multiplied: use both ghost filters, which CUDA devices compute with general kernels; else
            only the additive ones, as in the published models, which have fast kernels.
    """
    shape, taps, filters = (2, 9, 19), 7 * 7, (64, 7, 7)
    sizes = [(*shape, 64), (*shape, 2 * taps), filters, *[filters] * multiplied]
    function = partial(elsa_attention, kernel_size=7)
    return _errors(function, partial(elsa_attention_reference, kernel_size=7), sizes, device, dtype)


def check_convolution(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest error of ``elsa::grouped_conv`` and its gradients, as `check_operator`.

    In groups of 4 and of 8 channels, as in the published models.
    """
    shape, function = (2, 9, 19, 24), torch.ops.elsa.grouped_conv
    sizes = [[shape, shape, (24, width, 7, 7), (24,)] for width in (4, 8)]
    return max(error for s in sizes for error in _errors(function, function, s, device, dtype))


def check_backbones(device: torch.device, build: Callable[[str], nn.Module] | None = None) -> float:
    """Return the largest error of small float32 backbones, relative to the largest number.

    The reference is the backbone of `elsa_core` in double precision on the CPU, with the same state
    dict.

    Args:
        build: name of a class in ARCHS -> model of that architecture with all outputs, built by a
            framework; None for the classes of `elsa_core`.
    """
    families: dict[str, type[nn.Module]] = {"ELSASwin": ELSASwin, "ELSAVolo": ELSAVolo}
    errors = []
    for name, arch in ARCHS.items():
        exact = families[name](arch).eval()
        ours = families[name](arch) if build is None else build(name)
        ours.load_state_dict(exact.state_dict())
        image = torch.randn(1, 3, 61, 83, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = ours.eval().to(device)(image.to(device))
            expected = exact.double()(image.double())
        maps = found.values() if isinstance(found, dict) else found
        errors += [_error(*pair) for pair in zip(maps, expected, strict=True)]
    return max(errors)


def _errors(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    sizes: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Return the errors of a function's result, of the first size, and of all its gradients."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*size, generator=generator).to(dtype) for size in [*sizes, sizes[0]]]
    *exact, grad = [tensor.double() for tensor in drawn]
    ours = [tensor.to(device, dtype).requires_grad_() for tensor in exact]
    out = function(*ours)
    expected = reference(*(tensor.requires_grad_() for tensor in exact))
    grads = torch.autograd.grad(out, ours, grad.to(device, dtype))
    backward = max(map(_error, grads, torch.autograd.grad(expected, exact, grad)))
    return _error(out.detach(), expected.detach()), backward


def _error(result: Tensor, expected: Tensor) -> float:
    # Make NaN infinity, so that it is the largest error.
    difference = (result.cpu().double() - expected).abs().nan_to_num(nan=math.inf).max()
    return (difference / expected.abs().max()).item()
