"""Command line: ``python -m benchmarks.run`` measures and writes a folder of results."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path

import torch

from elsa_core import VOLO_VARIANTS
from elsa_core.runtime.errors import UsageError

from .clock import Clock
from .contenders import NEEDS, measure_models, measure_parts
from .measure import Row, describe
from .operator import measure_operator

PARTS = ("operator", "backbone", "detector", "parts")
RESULTS = Path(__file__).resolve().parent / "results"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Measure the operator, the backbone and Mask R-CNN beside what a user would "
        "pick instead: medians of interleaved runs, ratios, peak memory. Writes a table and a plot "
        "for each part, and the machine.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="the headline shapes and T only")
    parser.add_argument(
        "--variant",
        nargs="+",
        choices=("tiny", "small", *VOLO_VARIANTS),
        help="whose models are measured (default: tiny and small, with --quick tiny); of ELSA-VOLO "
        "the classifier, in the part backbone, and the operator at its shapes",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of PyTorch on the CPU; with 1, the default, CPU time is counted instead of wall time",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the models' input (default: 512 512 on the CPU, 800 1344 on a GPU)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="maps of a call of the operator and images of a model (default: 1 on the CPU, 2 on a "
        "GPU, which one image leaves idle)",
    )
    parser.add_argument("--rounds", type=int, default=7, help="of every comparison")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="after which a contender skips the other rounds"
    )
    parser.add_argument(
        "--memory-gib", type=float, default=8.0, help="most that the unfold path may take"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: by device, date)")
    options = parser.parse_args(arguments)
    if options.batch is None:
        options.batch = 1 if options.device == "cpu" else 2
    for name in ("threads", "batch", "rounds", "seconds", "memory_gib"):
        if getattr(options, name) <= 0:
            raise UsageError(
                f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}"
            )
    if options.size and min(options.size) < 32:
        raise UsageError(f"--size must be at least 32 32, got {options.size[0]} {options.size[1]}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a CUDA device, and PyTorch finds none")
    volos = _volos(options)
    if volos and not {*options.part} <= {"backbone", "operator"}:
        raise UsageError(
            f"--variant {volos[0]} needs --part backbone or operator, got {' '.join(options.part)}"
        )
    missing = {part: name for part, name in NEEDS.items() if not find_spec(name)}
    if found := [part for part in options.part if part not in missing]:
        for part in options.part:
            if part in missing:
                print(f"{part} left out: it needs {missing[part]}, which is not installed")
    else:
        raise UsageError(f"{options.part[0]} needs {missing[options.part[0]]}, not installed here")
    options.part = found
    return options


def _volos(options: argparse.Namespace) -> list[str]:
    return [name for name in options.variant or () if name in VOLO_VARIANTS]


def measure(
    options: argparse.Namespace, clock: Clock, dtype: torch.dtype
) -> Iterator[tuple[str, list[Row]]]:
    """Yields the name and rows of each part as soon as it is done."""
    size = tuple(options.size or ((512, 512) if options.device == "cpu" else (800, 1344)))
    rounds, seconds, quick, batch = options.rounds, options.seconds, options.quick, options.batch
    names = options.variant or (["tiny"] if quick else ["tiny", "small"])
    if "operator" in options.part:
        memory = int(options.memory_gib * 2**30)
        how = clock, dtype, batch, quick, memory, rounds, seconds
        volos = _volos(options)
        rows = measure_operator(*how) if len(volos) < len(names) else []
        if volos:
            rows += measure_operator(*how, volos)
        yield "operator", rows
    for part, models in {"backbone": "backbone", "detector": "mask rcnn"}.items():
        if part in options.part:
            yield part, measure_models(models, clock, dtype, names, batch, size, rounds, seconds)
    if "parts" in options.part:
        yield "parts", measure_parts(clock, dtype, names, batch, size, rounds)


def write(folder: Path, part: str, rows: list[Row], machine: dict[str, object]) -> None:
    """Writes <part>.csv, <part>.png (with matplotlib) and machine.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
    with (folder / f"{part}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        table.writeheader()
        for line in map(asdict, rows):
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()})
    if not find_spec("matplotlib"):
        print(f"{part}.png left out: matplotlib is not installed")
        return
    from .plots import draw

    draw(folder / f"{part}.png", part, rows, machine)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
    except UsageError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    clock, dtype = Clock(torch.device(options.device)), getattr(torch, options.dtype)
    machine = describe(clock, dtype)
    print(json.dumps(machine, indent=2), flush=True)
    folder = options.out or RESULTS / f"{machine['date']}-{options.device}-{options.dtype}"
    for part, rows in measure(options, clock, dtype):
        write(folder, part, rows, machine)
        print(f"{part} written to {folder}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
