"""Step "ncu": hardware counters of each of the operators' kernels, once, at stage 1.

The profiler says nothing before its program ends, so that each model has a run of its own.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .common import Rows, seconds_left, short, step_arguments
from .driver import CALLS

SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
METRICS = {
    "Duration": "duration",
    "Memory Throughput": "memory",
    "DRAM Throughput": "dram",
    "L1/TEX Cache Throughput": "l1",
    "L2 Cache Throughput": "l2",
    "Compute (SM) Throughput": "sm",
    "Registers Per Thread": "registers",
    "Dynamic Shared Memory Per Block": "shared",
    "Achieved Occupancy": "occupancy",
    "Mem Busy": "memory_busy",
    "Mem Pipes Busy": "memory_pipes",
}


def main() -> int:
    rows, folder, _ = step_arguments("ncu")
    report = folder / "ncu.csv"
    if not shutil.which("ncu"):
        report.write_text("ncu is not on the PATH\n")
        rows.add("ncu", error="ncu is not on the PATH")
        return 1
    report.write_text("")
    calls = [name for name in CALLS if name != "small"]
    return int(sum(profile(rows, report, name) for name in calls) < len(calls))


def profile(rows: Rows, report: Path, calls: str) -> bool:
    """Adds the counters of the driver's calls of that name; returns whether there are any."""
    # --clock-control none leaves the device's clocks alone.
    command = ["ncu", "--csv", "--page", "details", "--clock-control", "none"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += ["--kernel-name", "regex:elsa", "--kernel-name-base", "mangled"]
    command += ["--launch-count", "48", "--target-processes", "all"]
    command += [sys.executable, "-W", "ignore", "-m", "gpu.driver", calls]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(1.0, seconds_left() - 3)
        )
        out, end = done.stdout, f"status {done.returncode}"
        errors = done.stderr
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"").decode(errors="replace")
        end, errors = "out of time", ""
    with report.open("a") as file:
        file.write(out)
    kernels: dict[str, dict[str, str]] = {}
    start = out.find('"ID"')
    for line in csv.DictReader(io.StringIO(out[start:])) if start >= 0 else ():
        key = f"{calls} {line.get('ID')}: {short(line.get('Kernel Name') or '')}"
        row = kernels.setdefault(key, {})
        if (name := METRICS.get(line.get("Metric Name") or "")) is not None:
            row.setdefault(name, f"{line['Metric Value']} {line['Metric Unit']}".strip())
    for key, row in kernels.items():
        rows.add(key, **row)
    if not kernels:
        lines = (out + errors).splitlines()
        said = [line for line in lines if re.search("ERR|[Ee]rror|Failed", line)]
        rows.add(calls, error=f"no counters ({end}): {(said or lines[-1:] or [''])[0]}")
    return bool(kernels)


if __name__ == "__main__":
    sys.exit(main())
