"""What the steps share: rows, clocks, inputs, and where a rehearsal differs."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = "ELSA_GPU_CHECK_REHEARSAL" in os.environ
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = {  # batch, height, width, channels, heads
    "800x1344 batch 2, stage 1": (2, 200, 336, 96, 3),
    "800x1344 batch 2, stage 2": (2, 100, 168, 192, 6),
    "800x1344 batch 2, stage 3": (2, 50, 84, 384, 12),
    "224 batch 128, stage 1": (128, 56, 56, 96, 3),
    "224 batch 128, stage 2": (128, 28, 28, 192, 6),
    "224 batch 128, stage 3": (128, 14, 14, 384, 12),
}
VOLO_SHAPES = {  # of stage 1
    "VOLO-D1, 224 batch 128": (128, 28, 28, 192, 6),
    "VOLO-D5, 512 batch 16": (16, 64, 64, 384, 12),
}
if REHEARSAL:
    SHAPES, VOLO_SHAPES = (
        {name: (1, 5, 6, 32, 1) for name in list(s)[:1]} for s in (SHAPES, VOLO_SHAPES)
    )


class Setting(NamedTuple):
    """Batch, height, width, channels, heads; the kernel size, and which ghost filters there are."""

    shape: tuple[int, ...]
    kernel_size: int = 7
    ghosts: tuple[str, ...] = ("add",)


SETTINGS = {name: Setting(shape) for name, shape in SHAPES.items()}
SETTINGS |= {name: Setting(shape, 5, ("add", "mul")) for name, shape in VOLO_SHAPES.items()}

Run = Callable[[], object]


class Rows:
    """Appends rows to rows.jsonl, each as soon as it is known."""

    def __init__(self, step: str, folder: Path) -> None:
        self.step = step
        self.path = folder / "rows.jsonl"

    def add(self, case: str, **figures: Any) -> None:
        row = {"step": self.step, "case": case, **{k: _plain(v) for k, v in figures.items()}}
        row |= {"rehearsal": True} if REHEARSAL else {}
        line = json.dumps(row)
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    @contextmanager
    def case(self, case: str, **figures: Any) -> Iterator[dict[str, Any]]:
        """Adds a row with what the block puts into the dict; an exception becomes its "error".

        Raises:
            SystemExit: the device no longer works, so that nothing after this can.
        """
        row = dict(figures)
        broken = False
        try:
            yield row
        except Exception as error:
            row["error"] = one_line(error)
            broken = not device_works()
        self.add(case, **row)
        free()
        if broken:
            sys.exit(f"the device failed at {case}: {row['error']}")


def _plain(figure: Any) -> Any:
    """Returns a figure as JSON has it: NaN and infinity become text."""
    if isinstance(figure, float):
        return float(f"{figure:.5g}") if math.isfinite(figure) else str(figure)
    return figure


def one_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:400]


def device_works() -> bool:
    """Whether the device still runs kernels; a memory fault ends its context."""
    if REHEARSAL:
        return True
    try:
        torch.ones(1, device=DEVICE).add_(1).item()
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def free() -> None:
    """Gives memory back, so that each case starts with all of it."""
    gc.collect()
    if not REHEARSAL and torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except Exception as error:
            print(f"memory stays: {one_line(error)}", flush=True)


def step_arguments(step: str) -> tuple[Rows, Path, str]:
    """Returns the rows, the folder of the results and the part of the step to run."""
    parser = argparse.ArgumentParser(prog=f"gpu.{step}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default="")
    options = parser.parse_args()
    if REHEARSAL:
        from .rehearsal import install_stand_ins

        install_stand_ins()
        torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.freeze()  # what is imported is no garbage, and would take 0.1 s after each case
    return Rows(step, options.out), options.out, options.part


# --- Clocks. All times are microseconds of the device.


def captured(run: Run) -> Run:
    from benchmarks.clock import captured

    return captured(run)


def time_us(run: Run, calls: int = 1, graph: bool = True, budget: float = 0.25) -> float:
    """Returns the median time of a call.

    Args:
        run: makes ``calls`` calls.
        graph: replay a CUDA graph of them, without gaps between launches.
        budget: seconds to spend, about.
    """
    if graph:
        again = captured(run)
    else:
        again = run
        run()
    torch.cuda.synchronize()
    first = _elapsed(again, 1)
    first = min(first, _elapsed(again, 1))
    repeats = 1 if REHEARSAL else 5
    count = max(1, min(500, int(budget * 1e6 / repeats / max(first, 1.0))))
    if REHEARSAL:
        count = 1
    return statistics.median(_elapsed(again, count) for _ in range(repeats)) / calls


def _elapsed(run: Run, count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / count


def kernel_times(run: Run) -> list[tuple[str, float]]:
    """Returns name and microseconds of each kernel of a call, in order of their start."""
    run()
    torch.cuda.synchronize()
    kinds = torch.profiler.ProfilerActivity
    activity = kinds.CPU if REHEARSAL else kinds.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        run()
        torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CPU if REHEARSAL else torch.autograd.DeviceType.CUDA
    events = [event for event in profile.events() if event.device_type == kind]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def short(kernel: str) -> str:
    """Returns a kernel's name without its arguments and namespaces."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    return name.partition("(")[0].replace("elsa::cuda::", "")[:80]


# --- The operator.

NO_TRITON = "Triton is not installed, or elsa_core has no kernels for it"


def has_triton() -> bool:
    return all(map(find_spec, ("triton", "elsa_core.triton")))


def operator_of(family: str) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """Returns the forward and the backward function of "cuda", "triton" or "torch" kernels.

    Arguments are those of ``elsa::attention`` and ``elsa::attention_backward``.

    Raises:
        RuntimeError: there are no such kernels.
    """
    if family == "triton":
        if not has_triton():
            raise RuntimeError(NO_TRITON)
        from elsa_core.triton import operator

        return operator.attention, operator.attention_backward
    if family == "torch":
        from elsa_core import _fallback

        return _fallback.attention, _fallback.attention_backward
    import elsa_core  # noqa: F401
    import elsa_core.operator

    if not elsa_core.operator.has_extension or not hasattr(torch.ops.elsa, "cuda_architectures"):
        raise RuntimeError("the extension has no CUDA kernels")
    return torch.ops.elsa.attention, torch.ops.elsa.attention_backward


def convolution() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]] | None:
    """Returns ``elsa::grouped_conv`` and its backward if the device has kernels of its own."""
    with suppress(ImportError):
        import elsa_core.grouped_conv  # noqa: F401
    if not hasattr(torch.ops.elsa, "grouped_conv"):
        return None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not has_kernel("elsa::grouped_conv", DEVICE.type.upper()):
        return None
    return torch.ops.elsa.grouped_conv, torch.ops.elsa.grouped_conv_backward


def draw_convolution(
    shape: Sequence[int], width: int, dtype: torch.dtype, device: torch.device | str
) -> list[Tensor]:
    """Returns the gradient of the output, query, key, weight and bias, drawn on ``device``.

    Args:
        shape: batch, height, width, channels.
        width: channels of a group.
    """
    generator = torch.Generator(device).manual_seed(0)
    sizes = [shape] * 3 + [(shape[-1], width, 7, 7), shape[-1:]]
    drawn = [torch.randn(*size, generator=generator, device=device) for size in sizes]
    return [tensor.to(dtype) for tensor in drawn]


def draw(
    shape: Sequence[int],
    kernel_size: int,
    ghosts: Sequence[str],
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> list[Tensor | None]:
    """Returns the gradient of the output, value, logits and the two ghost filters or None.

    The numbers are drawn on ``device``.

    Args:
        shape: batch, height, width, channels, heads.
        ghosts: of "add", "mul", which are not None.
    """
    batch, height, width, channels, heads = shape
    generator = torch.Generator(device).manual_seed(seed)

    def numbers(*size: int) -> Tensor:
        drawn = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
        return drawn.to(dtype)

    filters = (channels, kernel_size, kernel_size)
    return [
        numbers(batch, height, width, channels),
        numbers(batch, height, width, channels),
        numbers(batch, height, width, heads * kernel_size**2),
        numbers(*filters) if "add" in ghosts else None,
        numbers(*filters) if "mul" in ghosts else None,
    ]


def seconds_left() -> float:
    """Returns the time before this process is ended."""
    return float(os.environ.get("ELSA_GPU_CHECK_END", "inf")) - time.monotonic()
