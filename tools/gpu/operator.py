"""Step "operator": the times of the operator at the shapes of ELSA-Swin-T and S, and of ELSA-VOLO.

Parts: cuda, compiled (torch.compile of the unfold path, for ELSA-Swin alone), triton, copy (of as
many bytes as the operator must read and write). Each time is that of CUDA graphs over three sets of
inputs.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .common import (
    DEVICE,
    DTYPES,
    NO_TRITON,
    REHEARSAL,
    SETTINGS,
    SHAPES,
    Setting,
    draw,
    has_triton,
    kernel_times,
    operator_of,
    short,
    step_arguments,
    time_us,
)

SETS = 1 if REHEARSAL else 3
STEPS = ("forward", "forward+backward")
# What the targets are about comes first.
ORDER = [("bf16", STEPS[1]), ("fp32", STEPS[0]), ("bf16", STEPS[0]), ("fp32", STEPS[1])]
Inputs = list[Tensor | None]
Call = Callable[[Inputs], object]


def plain_calls(family: str, kernel_size: int) -> dict[str, Call]:
    forward, backward = operator_of(family)

    def both(inputs: Inputs) -> None:
        forward(*inputs[1:], kernel_size, 1)
        backward(*inputs, kernel_size, 1)

    return {STEPS[0]: lambda inputs: forward(*inputs[1:], kernel_size, 1), STEPS[1]: both}


def compiled_calls() -> dict[str, Call]:
    from benchmarks.operator import unfold_path

    torch._dynamo.reset()
    backend = "aot_eager" if REHEARSAL else "inductor"
    fused = torch.compile(unfold_path, dynamic=False, backend=backend)

    def forward(inputs: Inputs) -> None:
        with torch.no_grad():
            fused(*inputs[1:])

    def both(inputs: Inputs) -> None:
        torch.autograd.grad(fused(*inputs[1:]), inputs[1:], inputs[0])

    return {STEPS[0]: forward, STEPS[1]: both}


def input_sets(part: str, setting: Setting, dtype: torch.dtype) -> list[Inputs]:
    """Returns gradient, value, logits and both ghost filters of each set, or for the compiled path
    the additive one, in the contender's layout."""
    sets: list[Inputs] = []
    for seed in range(SETS):
        drawn: Inputs = draw(*setting, dtype, DEVICE, seed)
        if part == "compiled":
            *maps, filters = [t for t in drawn if t is not None]
            maps = [t.permute(0, 3, 1, 2).contiguous() for t in maps]
            drawn = [maps[0], *(t.requires_grad_() for t in (*maps[1:], filters))]
        sets.append(drawn)
    return sets


def call_all(call: Call, sets: list[Inputs]) -> None:
    for inputs in sets:
        call(inputs)


def copies(setting: Setting, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    batch, height, width, channels, heads = setting.shape
    pixels = batch * height * width
    value, logits = pixels * channels, pixels * heads * setting.kernel_size**2
    runs = {}
    for step, count in zip(STEPS, (2 * value + logits, 5 * value + 3 * logits), strict=True):
        source = torch.randn(SETS, count // 2, device=DEVICE, dtype=dtype)
        target = torch.empty_like(source)
        runs[step] = lambda source=source, target=target: [
            torch.neg(a, out=b) for a, b in zip(source, target, strict=True)
        ]
    return runs


def main() -> int:
    rows, _, part = step_arguments("operator")
    if part == "triton" and not has_triton():
        rows.add("triton", contender="triton", absent=NO_TRITON)
        return 0
    failures = 0
    passes = [ORDER[:2], ORDER[2:]] if part == "compiled" else [ORDER]
    if REHEARSAL and part == "triton":  # its interpreter is slow
        passes = [ORDER[2:3]]
    for order in passes:
        for (name, setting), (dtype, step) in itertools.product(SETTINGS.items(), order):
            if part == "compiled" and name not in SHAPES:
                continue
            figures = {"contender": part, "dtype": dtype, "pass": step}
            with rows.case(name, **figures) as row:
                if part == "copy":
                    row["us"] = time_us(copies(setting, DTYPES[dtype])[step], SETS)
                    continue
                plain = partial(plain_calls, part, setting.kernel_size)
                call = (compiled_calls if part == "compiled" else plain)()[step]
                sets = input_sets(part, setting, DTYPES[dtype])
                row["us"] = time_us(partial(call_all, call, sets), SETS)
                if part in ("cuda", "triton"):
                    sums: dict[str, float] = defaultdict(float)
                    for kernel, us in kernel_times(partial(call, sets[0])):
                        sums[short(kernel)] += us
                    largest = sorted(sums.items(), key=lambda item: -item[1])[:8]
                    row["kernels"] = {kernel: round(us, 2) for kernel, us in largest}
            failures += "error" in row
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
