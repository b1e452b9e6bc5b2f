"""Step "conv": the grouped 7x7 convolution that makes ELSA's logits.

Parts: heuristics, benchmark: cuDNN remembers the kernel of a problem for all of a process, however
it was chosen. First the whole function in each of its forms, as the backbone calls it; then cuDNN's
three passes for each type and memory layout, and the dense form's.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    DEVICE,
    DTYPES,
    REHEARSAL,
    Rows,
    convolution,
    draw_convolution,
    step_arguments,
    time_us,
)

KERNEL = 7
# Batch, height, width and channels of the maps at 800x1344, for T and S alike.
MAPS = {"stage 1": (2, 200, 336, 64), "stage 2": (2, 100, 168, 128), "stage 3": (2, 50, 84, 256)}
if REHEARSAL:
    MAPS = {name: (1, 5, 6, 16) for name in list(MAPS)[:1]}
WIDTHS = (4, 8)
TOLERANCE = 1.6e-2
"""Of a form's difference from the first one, relative to the largest number: bfloat16 and TF32."""
PASSES = {"forward": None, "grad input": [True, False, False], "grad weight": [False, True, True]}


def measure_forms(rows: Rows, benchmark: bool) -> int:
    """Times the forms of elsa_core.grouped_conv, and compares their results with the first one's.

    Returns how many cases fail.
    """
    try:
        from elsa_core import grouped_conv
    except ImportError:
        rows.add("forms", absent="elsa_core has no grouped_conv")
        return 0
    own = convolution()
    if own is None:
        rows.add("forms", absent="there are no kernels of our own for the grouped convolution")
    failures = 0
    for dtype, (stage, shape), width in itertools.product(("bf16", "fp32"), MAPS.items(), WIDTHS):
        channels = shape[-1]
        groups = channels // width
        grad, *inputs = draw_convolution(shape, width, DTYPES[dtype], DEVICE)
        inputs = [t.requires_grad_() for t in inputs]
        exact = None
        for form in ("torch", "dense", "cuda"):
            if form == "cuda" and (own is None or dtype == "fp32"):
                continue
            with rows.case(
                f"{stage}, width {width}", form=form, dtype=dtype, benchmark=benchmark, wrong=0
            ) as row:
                call = partial(grouped_conv.product_conv2d, *inputs, groups)
                if own and form == "cuda":
                    call, form = partial(own[0], *inputs), "torch"
                with grouped_conv.use(form), torch.no_grad():
                    out = call().float()
                    exact = out if exact is None else exact
                    difference = ((out - exact).abs().max() / exact.abs().max()).item()
                    row["difference_of_max"] = difference
                    row["wrong"] = int(not difference <= TOLERANCE)
                    row["forward_us"] = time_us(call, budget=0.1)

                def both(call: partial = call) -> None:
                    torch.autograd.grad(call(), inputs, grad)  # noqa: B023

                with grouped_conv.use(form):
                    row["both_us"] = time_us(both, budget=0.1)
            failures += "error" in row or row["wrong"]
    return failures


def cases() -> Iterator[tuple[str, str, int, str, str]]:
    """Yields form, layout, width, type and stage, the most telling ones first."""
    seen = set()
    orders = [
        itertools.product(("cudnn",), ("NHWC",), WIDTHS, ("bf16",), MAPS),
        itertools.product(("dense",), ("NHWC",), WIDTHS, ("bf16",), MAPS),
        itertools.product(("cudnn",), ("NCHW",), WIDTHS, ("bf16",), MAPS),
        itertools.product(("cudnn",), ("NHWC", "NCHW"), WIDTHS, DTYPES, MAPS),
        itertools.product(("dense",), ("NHWC",), WIDTHS, ("fp16", "fp32"), MAPS),
    ]
    for case in itertools.chain(*orders):
        if case not in seen and not (REHEARSAL and len(seen) == 6):
            seen.add(case)
            yield case


def dense(weight: Tensor, groups: int) -> Tensor:
    """Returns the weight of the same convolution without groups: [C, C, K, K]."""
    width = weight.shape[1]
    whole = weight.new_zeros(groups, width, groups, width, KERNEL, KERNEL)
    index = torch.arange(groups, device=weight.device)
    whole[index, :, index] = weight.unflatten(0, (groups, width))
    return whole.flatten(0, 1).flatten(1, 2)


def measure_passes(rows: Rows, benchmark: bool) -> int:
    failures = 0
    for form, layout, width, dtype, stage in cases():
        batch, height, span, channels = MAPS[stage]
        groups = channels // width
        figures = {"form": form, "layout": layout, "dtype": dtype, "benchmark": benchmark}
        with rows.case(f"{stage}, width {width}, passes", **figures) as row:
            memory = torch.channels_last if layout == "NHWC" else torch.contiguous_format

            def drawn(*size: int) -> Tensor:
                numbers = torch.randn(*size, device=DEVICE).to(DTYPES[dtype])  # noqa: B023
                return numbers.contiguous(memory_format=memory)  # noqa: B023

            x, grad = (drawn(batch, channels, height, span) for _ in range(2))
            weight = drawn(channels, width, KERNEL, KERNEL)
            if form == "dense":
                weight, groups = dense(weight, groups).contiguous(memory_format=memory), 1
            padding = [KERNEL // 2] * 2
            for name, mask in PASSES.items():
                if mask is None:
                    run = partial(F.conv2d, x, weight, None, 1, KERNEL // 2, 1, groups)
                else:
                    backward = torch.ops.aten.convolution_backward
                    options = ([channels], [1, 1], padding, [1, 1], False, [0, 0], groups, mask)
                    run = partial(backward, grad, x, weight, *options)
                row[f"{name} us"] = time_us(run, budget=0.1)
        failures += "error" in row
    return failures


def main() -> int:
    rows, _, part = step_arguments("conv")
    benchmark = torch.backends.cudnn.benchmark = part == "benchmark"
    return int(measure_forms(rows, benchmark) + measure_passes(rows, benchmark) > 0)


if __name__ == "__main__":
    sys.exit(main())
