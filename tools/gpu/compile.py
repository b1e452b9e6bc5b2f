"""Step "compile": what torch.compile makes of the backbones, of the operator's definition, and of
flex_attention with the logits as scores beside a depthwise convolution.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from elsa_core import elsa_attention_reference

from .common import DEVICE, DTYPES, REHEARSAL, SHAPES, Rows, draw, step_arguments, time_us
from .models import CASES, elsa, step_of, swin

BACKEND = "eager" if REHEARSAL else "inductor"


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend=BACKEND)


def backbones(rows: Rows) -> int:
    failures = 0
    for size_name, (batch, size) in CASES.items():
        for train in (True,) if REHEARSAL else (True, False):
            for contender, build in (("elsa", elsa), ("swin", swin)):
                mode = "training step" if train else "inference"
                with rows.case(f"tiny {size_name}", contender=contender, mode=mode) as row:
                    torch.manual_seed(0)
                    model = build("tiny", size).to(DEVICE)
                    image = torch.randn(batch, 3, *size, device=DEVICE)
                    run = step_of(compiled(model), image, train)
                    row["us"] = time_us(run, budget=0.6)
                    model = run = image = None
                failures += "error" in row
    return failures


def operator(rows: Rows) -> int:
    """The definition, offset by offset."""
    failures = 0
    name, shape = next(iter(SHAPES.items()))
    for dtype in ("bf16",) if REHEARSAL else ("bf16", "fp32"):
        with rows.case(name, contender="compiled reference", dtype=dtype) as row:
            drawn = draw(shape, 7, ("add",), DTYPES[dtype], DEVICE)
            grad, *inputs = [t for t in drawn if t is not None]
            fused = compiled(partial(elsa_attention_reference, kernel_size=7))
            with torch.no_grad():
                row["forward_us"] = time_us(lambda: fused(*inputs))  # noqa: B023
            leaves = [t.requires_grad_() for t in inputs]
            row["both_us"] = time_us(
                lambda: torch.autograd.grad(fused(*leaves), leaves, grad)  # noqa: B023
            )
        failures += "error" in row
    return failures


def flex(rows: Rows) -> int:
    """Positions outside the map take no part in its softmax, so that results differ at borders."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    failures = 0
    name, shape = next(iter(SHAPES.items()))
    batch, height, width, channels, heads = shape
    for dtype in ("bf16",):
        with rows.case(name, contender="flex_attention", dtype=dtype) as row:
            drawn = draw(shape, 7, ("add",), DTYPES[dtype], DEVICE)
            grad, value, logits, filters = [t for t in drawn if t is not None]
            length = height * width
            scores = logits.reshape(batch, length, heads, 49)
            values = value.reshape(batch, length, heads, -1).transpose(1, 2).contiguous()
            nothing = torch.zeros_like(values)

            def near(b, h, q, k):
                rows_apart = k // width - q // width  # noqa: B023
                columns_apart = k % width - q % width  # noqa: B023
                return (rows_apart.abs() <= 3) & (columns_apart.abs() <= 3)

            def score(_, b, h, q, k):
                y = (k // width - q // width + 3).clamp(0, 6)  # noqa: B023
                x = (k % width - q % width + 3).clamp(0, 6)  # noqa: B023
                return scores[b, q, h, y * 7 + x]  # noqa: B023

            make, fused = create_block_mask, flex_attention
            if not REHEARSAL:  # else the mask would need the square of the map's size
                make, fused = compiled(make), torch.compile(fused, dynamic=False)
            mask = make(near, None, None, length, length, device=DEVICE)
            weight = filters[:, None].contiguous(memory_format=torch.channels_last)

            def run() -> None:
                fused(nothing, nothing, values, score_mod=score, block_mask=mask)  # noqa: B023
                picture = value.permute(0, 3, 1, 2)  # noqa: B023
                F.conv2d(picture, weight, padding=3, groups=channels)  # noqa: B023

            with torch.no_grad():
                row["forward_us"] = time_us(run)
        failures += "error" in row
    return failures


def main() -> int:
    rows, _, part = step_arguments("compile")
    return int({"backbones": backbones, "operator": operator, "flex": flex}[part](rows) > 0)


if __name__ == "__main__":
    sys.exit(main())
