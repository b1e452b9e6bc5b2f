"""Check and measure everything on a machine with a GPU by one command; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from gpu.schedule import STEPS, Schedule  # noqa: E402

EXIT_STATUS = (
    "exit status: 0 the kernels are right and clean as far as the chosen steps say, 1 they are not "
    "or a step did not end, 2 wrong usage or no device"
)
LONGEST = 558


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description="Check the operator's kernels on a CUDA device, then measure them, the grouped "
        "convolution and the backbones beside their peers. Build the extension before, with "
        "FORCE_CUDA=1. Writes summary.md, rows.jsonl, machine.json, tests.xml, sanitizer.txt, "
        "profile.txt, ncu.csv and log.txt; rows come as they are known, and a step that fails or "
        "runs out of time stops no other one.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="FOLDER")
    parser.add_argument(
        "--only", nargs="+", choices=list(STEPS), metavar="STEP", help=f"of {', '.join(STEPS)}"
    )
    parser.add_argument(
        "--seconds", type=float, default=LONGEST, help=f"most that all may take, default: {LONGEST}"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run every step at tiny sizes on the CPU, with emulated kernels, Triton's interpreter "
        "and stand-ins for NVIDIA's tools: figures mean nothing",
    )
    parser.add_argument(
        "--emulation", type=Path, metavar="FOLDER", help="keep the rehearsal's kernels there"
    )
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds:g}")
    if options.emulation and not options.rehearse:
        parser.error("--emulation needs --rehearse")
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no CUDA device; --rehearse needs none")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.out.exists():
        for name in Schedule.FILES:
            (options.out / name).unlink(missing_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"}
        place = ROOT
        if options.rehearse:
            os.environ["ELSA_GPU_CHECK_REHEARSAL"] = "1"
            from gpu import rehearsal

            place = (options.emulation or scratch / "emulation").resolve()
            rehearsal.build(place)
            environment = rehearsal.environment(place)
        schedule = Schedule(options.out.resolve(), scratch, place, environment, options.seconds)
        return schedule.run(options.only or list(STEPS))
    finally:
        os.environ.pop("ELSA_GPU_CHECK_REHEARSAL", None)
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
