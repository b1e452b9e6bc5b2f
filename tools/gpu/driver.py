"""Calls the operator and does nothing else, for NVIDIA's tools.

Inputs are drawn on the CPU and copied, so that no other kernel writes what the operator reads: a
tool that looks at the operator's kernels alone would take that for memory that nothing has written.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch

from .common import (
    DEVICE,
    DTYPES,
    REHEARSAL,
    SETTINGS,
    convolution,
    draw,
    draw_convolution,
    operator_of,
)

MAPS = [(1, 1, 1), (1, 2, 3), (1, 8, 16), (2, 9, 17), (1, 7, 1), (1, 1, 40), (1, 20, 5)]
MAPS += [(1, 16, 32), (1, 17, 33), (3, 5, 5), (1, 3, 50), (1, 13, 19)]
if REHEARSAL:
    MAPS = MAPS[3:4]
CONVOLVED = [(1, 5, 6, 16) if REHEARSAL else (2, 200, 336, 64)]
# Channels, heads, kernel size, dilation, ghosts, types.
PROBLEMS = [
    (64, 2, 7, 1, ("add",), ("fp32", "bf16", "fp16")),
    (64, 2, 5, 1, ("add", "mul"), ("fp32", "bf16")),
    (30, 3, 3, 2, ("add", "mul"), ("fp32",)),
]


def small() -> list[tuple]:
    """Returns the calls for the sanitizers."""
    return [
        ((*size, channels, heads), kernel_size, dilation, ghosts, dtype)
        for channels, heads, kernel_size, dilation, ghosts, dtypes in PROBLEMS
        for dtype in dtypes
        for size in MAPS
    ]


def first(kernel_size: int) -> list[tuple]:
    """Returns the calls for the profiler: of a model's first map, each kernel once a type."""
    setting = next(s for s in SETTINGS.values() if s.kernel_size == kernel_size)
    return [(setting.shape, kernel_size, 1, setting.ghosts, dtype) for dtype in ("bf16", "fp32")]


# The first is for the sanitizers, the others are for the profiler.
CALLS: dict[str, Callable[[], list[tuple]]] = {
    "small": small,
    "swin": partial(first, 7),
    "convolution": list,
    "volo": partial(first, 5),
}


def convolve(size: str) -> int:
    """Calls the grouped convolution's own kernels, if there are any; returns how many calls."""
    operators = convolution()
    if operators is None:
        return 0
    forward, backward = operators
    shapes = {"small": [(1, 1, 1, 8), (1, 17, 17, 40), (2, 3, 40, 16)], "convolution": CONVOLVED}
    calls = list(itertools.product(shapes.get(size, ()), (4, 8), ("bf16",)))
    for done, (shape, width, dtype) in enumerate(calls, 1):
        tensors = draw_convolution(shape, width, DTYPES[dtype], "cpu")
        grad, *inputs = [tensor.to(DEVICE) for tensor in tensors]
        forward(*inputs)
        backward(grad, *inputs)
        torch.cuda.synchronize()
        print(f"convolution {done}: {'x'.join(map(str, shape))} width {width}", flush=True)
    return len(calls)


def main() -> None:
    if REHEARSAL:
        from .rehearsal import install_stand_ins

        install_stand_ins()
    calls = CALLS[sys.argv[1]]()
    convolved = convolve(sys.argv[1])
    forward, backward = operator_of("cuda")
    for done, (shape, kernel_size, dilation, ghosts, dtype) in enumerate(calls, 1):
        tensors = draw(shape, kernel_size, ghosts, DTYPES[dtype], "cpu")
        grad, *inputs = [None if t is None else t.to(DEVICE) for t in tensors]
        forward(*inputs, kernel_size, dilation)
        backward(grad, *inputs, kernel_size, dilation)
        torch.cuda.synchronize()
        named = "x".join(map(str, shape))
        said = f"{named} K {kernel_size} {ghosts} {dtype}"
        print(f"call {convolved + done} of {convolved + len(calls)}: {said}", flush=True)
    print("all calls done", flush=True)


if __name__ == "__main__":
    main()
