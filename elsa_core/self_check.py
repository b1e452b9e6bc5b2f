"""Checks of the operator and of the backbones against double precision on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).double()

    shape, taps = (2, 9, 19), 7 * 7
    exact = [draw(*shape, 64), draw(*shape, 2 * taps), draw(64, 7, 7)]
    if multiplied:
        exact.append(draw(64, 7, 7))
    ours = [tensor.to(device, dtype).requires_grad_() for tensor in exact]
    exact = [tensor.requires_grad_() for tensor in exact]
    grad = draw(*shape, 64)
    out = elsa_attention(*ours, kernel_size=7)
    expected = elsa_attention_reference(*exact, kernel_size=7)
    grads = torch.autograd.grad(out, ours, grad.to(device, dtype))
    expected_grads = torch.autograd.grad(expected, exact, grad)
    backward = max(map(_error, grads, expected_grads))
    return _error(out.detach(), expected.detach()), backward


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


def _error(result: Tensor, expected: Tensor) -> float:
    # Make NaN infinity, so that it is the largest error.
    difference = (result.cpu().double() - expected).abs().nan_to_num(nan=math.inf).max()
    return (difference / expected.abs().max()).item()
