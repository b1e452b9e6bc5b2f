"""``elsa::attention`` and its backward by Triton: memory, block sizes and launches.

What the kernels do not serve (float64, K > 13, sides of 44 million) goes to plain PyTorch.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from .. import _fallback
from .._problem import check_problem
from .gradients import ghost_kernel, logits_kernel
from .kernels import forward_kernel, value_kernel

if not hasattr(triton.language, "gather"):
    raise ImportError(f"Triton 3.3 or later is needed, and this is {triton.__version__}")

KERNELS = {
    "forward": forward_kernel,
    "logits": logits_kernel,
    "value": value_kernel,
    "ghost": ghost_kernel,
}
LARGEST_KERNEL = 13
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARTS = 64
"""Most parts of the sums for the ghost filters."""
_MOST_NUMBERS = 2**31 - 1
_ALIGNED = 16
"""Strides and addresses in bytes that are its multiples have code of their own in Triton."""


class Blocks(NamedTuple):
    """The tile of a program: rows and columns of positions, channels of a head; and its warps."""

    rows: int
    columns: int
    channels: int
    warps: int


def blocks(
    kernel: str, kernel_size: int, depth: int, bytes: int, multiplied: bool = False
) -> Blocks:
    """Return the tile of a kernel ("forward", "logits", "value", "ghost").

    By count of registers: for K = 7, or K = 5 with both filters, and 32 channels per head, none is
    spilled.

    Args:
        kernel_size: K.
        depth: channels per head.
        bytes: of a number.
        multiplied: whether there is a multiplicative filter.
    """
    if kernel == "logits":  # matrices of the tensor cores: the band is K - 1 pixels wider than high
        return Blocks(1, 16, max(16, min(_power(depth), 64)), 2 if multiplied else 1)
    channels = min(_power(depth), 32)
    if kernel == "ghost":
        columns = max(1, min(4096 // (_power(kernel_size) * channels), 16))
        return Blocks(1, columns, channels, 4)
    positions = min(8192 // bytes // channels, 128)
    return Blocks(positions // 16, 16, channels, 4)


def attention(
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None,
    ghost_mul: Tensor | None,
    kernel_size: int,
    dilation: int,
) -> Tensor:
    """``elsa::attention``; see ``elsa_attention``."""
    check_problem(value, logits, ghost_add, ghost_mul, kernel_size, dilation)
    if not _is_served(value, kernel_size):
        return _fallback.attention(value, logits, ghost_add, ghost_mul, kernel_size, dilation)
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    if out.numel():
        call = _Call(value, logits, ghost_add, ghost_mul, kernel_size, dilation)
        with call.device:
            call.run("forward", ("value", "logits"), out=out, **call.filters())
    return out


def attention_backward(
    grad: Tensor,
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None,
    ghost_mul: Tensor | None,
    kernel_size: int,
    dilation: int,
    ghost_gradients: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``elsa::attention_backward``; see the default kernel of that name."""
    problem = (value, logits, ghost_add, ghost_mul, kernel_size, dilation)
    check_problem(*problem, grad=grad)
    if not _is_served(value, kernel_size):
        return _fallback.attention_backward(grad, *problem, ghost_gradients)
    grad_value, grad_logits = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (value, logits)
    )
    wanted = {
        name: ghost
        for name, ghost in (("add", ghost_add), ("mul", ghost_mul))
        if ghost is not None and ghost_gradients
    }
    if not value.numel():
        grads = {name: ghost.new_zeros(ghost.shape) for name, ghost in wanted.items()}
    else:
        call = _Call(*problem, grad=grad)
        softmax = value.new_empty(*value.shape[:3], call.heads, 2, dtype=torch.float32)
        parts = min(PARTS, call.batch * call.height)
        sums = {name: softmax.new_empty(parts, kernel_size**2, call.channels) for name in wanted}
        with call.device:
            filters = call.filters()
            multiplied = {name: filters[name] for name in ("ghost_mul", "MUL")}
            maps = ("grad", "value", "logits")
            call.run(
                "logits",
                maps,
                size=kernel_size,
                grad_logits=grad_logits,
                softmax=softmax,
                **multiplied,
            )
            call.run("value", ("grad", "logits"), softmax=softmax, grad_value=grad_value, **filters)
            if wanted:
                call.run(
                    "ghost",
                    maps,
                    size=kernel_size,
                    parts=parts,
                    softmax=softmax,
                    add_parts=sums.get("add"),
                    mul_parts=sums.get("mul"),
                    ADD="add" in sums,
                    MUL="mul" in sums,
                )
        grads = {
            name: torch.empty_like(ghost, memory_format=torch.contiguous_format).copy_(
                sums[name].sum(0).t().reshape(ghost.shape)
            )
            for name, ghost in wanted.items()
        }
    add, mul = (grads[name] if name in grads else value.new_empty(0) for name in ("add", "mul"))
    return grad_value, grad_logits, add, mul


class _Call:
    """The sizes and maps of a call, and the launch of its kernels."""

    def __init__(
        self,
        value: Tensor,
        logits: Tensor,
        ghost_add: Tensor | None,
        ghost_mul: Tensor | None,
        kernel_size: int,
        dilation: int,
        grad: Tensor | None = None,
    ) -> None:
        self.batch, self.height, self.width, self.channels = value.shape
        self.heads = logits.shape[-1] // kernel_size**2
        self.kernel_size, self.depth = kernel_size, self.channels // self.heads
        # Beyond the map all dilations are the same.
        self.dilation = min(dilation, max(self.height, self.width))
        maps = {"value": value, "logits": logits, "grad": grad}
        self._maps = {name: _packed(t) for name, t in maps.items() if t is not None}
        self._ghosts = {"add": ghost_add, "mul": ghost_mul}
        module: Any = torch.get_device_module(value.device)
        self.device = nullcontext() if value.is_cpu else module.device(value.device)

    def filters(self) -> dict[str, Any]:
        """Return both filters as the kernels want them, (K * K, C) in float32 or None."""
        arguments: dict[str, Any] = {}
        for name, ghost in self._ghosts.items():
            arguments[name.upper()] = ghost is not None
            arguments[f"ghost_{name}"] = None
            if ghost is not None:
                table = ghost.new_empty(self.kernel_size**2, self.channels, dtype=torch.float32)
                arguments[f"ghost_{name}"] = table.copy_(ghost.flatten(1).t())
        return arguments

    def run(self, kernel: str, maps: tuple[str, ...], size: int | None = None, **own: Any) -> None:
        """Launch a kernel.

        Args:
            maps: names of the maps that it reads.
            size: numbers along its axis of taps, where it has one.
            own: its other arguments.
        """
        bytes = self._maps["value"].element_size()
        multiplied = self._ghosts["mul"] is not None
        block = blocks(kernel, self.kernel_size, self.depth, bytes, multiplied)
        for name in maps:
            own[name] = self._maps[name]
            for axis, stride in zip(("image", "row", "column"), _strides(own[name]), strict=True):
                own[f"{name}_{axis}"] = stride
        groups = triton.cdiv(self.depth, block.channels)
        if kernel == "ghost":
            own["rows"] = self.batch * self.height
            grid = (own["parts"] * self.heads, groups, self.kernel_size)
        elif kernel == "logits":
            apart = min(self.dilation, self.width)
            across = triton.cdiv(triton.cdiv(self.width, apart), block.columns) * apart
            tiles = self.height * across
            # A filter would be rounded; and Triton's interpreter multiplies bfloat16 as integers.
            own["WIDEN"] = own["MUL"] or not isinstance(KERNELS[kernel], JITFunction)
            grid = (self.batch * tiles * self.heads, 1, 1)
        else:
            own["ROWS"] = block.rows
            tiles = triton.cdiv(self.height, block.rows) * triton.cdiv(self.width, block.columns)
            grid = (self.batch * tiles * self.heads, groups, 1)
        if size is not None:
            own["SIZE"] = _power(size)
        KERNELS[kernel][grid](
            height=self.height,
            width=self.width,
            heads=self.heads,
            dilation=self.dilation,
            KERNEL=self.kernel_size,
            DEPTH=self.depth,
            COLUMNS=block.columns,
            CHANNELS=block.channels,
            WIDE=self._is_wide(),
            num_warps=block.warps,
            enable_fp_fusion=True,
            **own,
        )

    def _is_wide(self) -> bool:
        """Whether numbers of an image are counted in 64 bits."""
        reach = self.kernel_size // 2 * self.dilation
        rows, columns = self.height + reach, self.width + reach
        most = 2 * self.heads * rows * columns
        for tensor in self._maps.values():
            _, row, column = _strides(tensor)
            most = max(most, rows * row + columns * column + tensor.shape[-1])
        return most > _MOST_NUMBERS


def _is_served(value: Tensor, kernel_size: int) -> bool:
    batch, height, width, channels = value.shape
    # Counted in 32 bits: columns, up to 48 dilations beyond the map; image rows; sums for filters.
    most = max(48 * max(height, width), batch * height, PARTS * kernel_size**2 * channels)
    return value.dtype in DTYPES and kernel_size <= LARGEST_KERNEL and most < 2**31


def _packed(tensor: Tensor) -> Tensor:
    """Return the map, or a contiguous copy.

    The copy is for channels that do not follow each other, and where an address or a stride is a
    multiple of 16 other than a contiguous map's: Triton would compile code of its own for it, with
    another order of sums.
    """
    _, height, width, channels = tensor.shape
    usual = (height * width * channels, width * channels, channels)
    axes = zip(tensor.shape[:3], _strides(tensor), usual, strict=True)
    alike = all(size == 1 or _code(stride) == _code(other) for size, stride, other in axes)
    follow = channels == 1 or tensor.stride(-1) == 1
    if follow and alike and tensor.data_ptr() % _ALIGNED == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _code(stride: int) -> tuple[bool, bool]:
    """Return what Triton compiles for this stride and not for all."""
    return stride == 1, stride % _ALIGNED == 0


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides of a map's first three axes; 0 for those of length 1, which mean nothing.

    All are positive: PyTorch has no negative ones.
    """
    axes = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return [stride if size > 1 else 0 for size, stride in axes]


def _power(number: int) -> int:
    """Return the power of 2 that is not smaller."""
    return triton.next_power_of_2(number)
