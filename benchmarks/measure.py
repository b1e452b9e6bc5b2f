"""Compares contenders in interleaved runs, measures memory and describes the machine."""

from __future__ import annotations

import datetime
import gc
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

import elsa_core
from elsa_core import doctor

from .clock import Clock, Run


@dataclass
class Row:
    """One line of a table. ``ratio`` is the median relative to ELSA's in the same rounds."""

    part: str
    case: str
    step: str
    contender: str
    median_ms: float
    fastest_ms: float
    rounds: int
    ratio: float
    peak_mib: float


def peak_memory(run: Run, device: torch.device) -> float:
    """Returns the peak memory of PyTorch's allocator during the call, beyond the start, in MiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - start) / 2**20
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def compare(
    part: str,
    case: str,
    step: str,
    runs: Mapping[str, Run],
    clock: Clock,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Times all contenders, one call of each per round; ratios refer to the first one.

    A contender that has used up ``seconds`` skips the remaining rounds, but runs in 2 at least.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = {}
    for name, run in runs.items():
        run()  # compiles, fills caches
        peaks[name] = peak_memory(run, clock.device)
    for _ in range(rounds):
        for name, run in runs.items():
            if len(times[name]) < 2 or sum(times[name]) < seconds:
                times[name].append(clock.time(run))
    first = next(iter(runs))
    rows = []
    for name, measured in times.items():
        median = statistics.median(measured)
        base = statistics.median(times[first][: len(measured)])
        figures = (1e3 * median, 1e3 * min(measured), len(measured), median / base, peaks[name])
        rows.append(Row(part, case, step, name, *figures))
        print(
            f"{part:9} {case:24} {step:16} {name:24} {1e3 * median:9.2f} ms "
            f"{median / base:7.2f}x {peaks[name]:8.1f} MiB",
            flush=True,
        )
    return rows


Parts = Callable[[], Iterator[str]]
"""Runs a model and yields the name of each part as soon as it is done."""

WHOLE, SUM = "whole", "sum of the parts"
TOLERANCE = 0.03
"""By which the sum of the parts may differ from the whole."""


def compare_parts(
    case: str, wholes: Mapping[str, Run], parts: Mapping[str, Parts], clock: Clock, rounds: int
) -> list[Row]:
    """Times the whole and each part of all contenders in turns; ratios refer to the first one.

    Says whose parts do not add up to the whole.
    """
    times: dict[tuple[str, str], list[float]] = {}
    for name, whole in wholes.items():
        whole()
        list(clock.split(parts[name]()))
    for _ in range(rounds):
        for name, whole in wholes.items():
            times.setdefault((WHOLE, name), []).append(clock.time(whole))
            for part, seconds in clock.split(parts[name]()):
                times.setdefault((part, name), []).append(seconds)
    medians = {key: statistics.median(measured) for key, measured in times.items()}
    first = next(iter(wholes))
    for name in wholes:
        own = [value for (part, which), value in medians.items() if which == name and part != WHOLE]
        medians[SUM, name] = sum(own)
    rows = []
    for part in dict.fromkeys(part for part, _ in [*medians]):
        for name in wholes:
            measured = times.get((part, name), [medians[part, name]])
            ratio = medians[part, name] / medians[part, first]
            figures = (1e3 * medians[part, name], 1e3 * min(measured), rounds, ratio, math.nan)
            rows.append(Row("parts", case, part, name, *figures))
            print(f"parts {case:24} {part:16} {name:24} {figures[0]:9.2f} ms {ratio:7.2f}x")
    for name in wholes:
        share = medians[SUM, name] / medians[WHOLE, name]
        verdict = "add" if abs(share - 1) <= TOLERANCE else "DO NOT ADD"
        print(f"{name}: the parts {verdict} up to the whole ({share:.1%})", flush=True)
    return rows


def copy(count: int, device: torch.device, dtype: torch.dtype) -> Run:
    """Copies ``count`` random numbers: devices are faster with equal ones."""
    source = torch.randn(count, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def product(side: int, device: torch.device, dtype: torch.dtype) -> Run:
    """Multiplies a random matrix of ``side`` x ``side`` by itself."""
    square = torch.randn(side, side, device=device, dtype=dtype)
    return lambda: square @ square


def limits(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """Measures the limits of the machine: a copy and a square matrix product."""
    count = 2**26  # far larger than any cache
    side = 8192 if clock.device.type == "cuda" else 1536

    def best(run: Run) -> float:
        run()
        return min(clock.time(run) for _ in range(5))

    copying, multiplying = copy(count, clock.device, dtype), product(side, clock.device, dtype)
    return {
        "copy_gb_per_s": 2 * count * dtype.itemsize / best(copying) / 1e9,
        "matrix_product_tflops": 2 * side**3 / best(multiplying) / 1e12,
    }


def describe(clock: Clock, dtype: torch.dtype) -> dict[str, object]:
    """Describes the machine and the software, for later readers of the results."""
    report = doctor.examine(frameworks=False)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.date.today().isoformat(),
        "device": doctor.describe_device(clock.device),
        "dtype": str(dtype).removeprefix("torch."),
        "clock": clock.name,
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
        "elsa_core": elsa_core.__version__,
        "doctor": [line for line in report.lines if not line.startswith("extension:")],
        "self_check": "WRONG" if report.faults else "right",
        "limits": {name: round(value, 3) for name, value in limits(clock, dtype).items()},
    }
