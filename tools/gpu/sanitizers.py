"""Step "sanitizers": compute-sanitizer's four tools at the same time, on the operator alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .common import seconds_left, step_arguments

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Only our kernels are looked at, but by initcheck, which must see what others write. Calls of
# PyTorch that fail by design are not errors.
OURS = ("--kernel-name", "kns=elsa", "--error-exitcode", "9")
OPTIONS = {"memcheck": (*OURS, "--report-api-errors", "no"), "racecheck": OURS, "synccheck": OURS}
OPTIONS["initcheck"] = OURS[2:]
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
CALL = re.compile(r"^call (\d+ of \d+)", re.MULTILINE)


def judge(log: str, ended: bool) -> dict[str, object]:
    """Returns the row of a tool: "state" is clean, errors or not shown."""
    row: dict[str, object] = {"calls": ([""] + CALL.findall(log))[-1] or "none"}
    findings = [line for line in log.splitlines() if line.startswith("========= ")]
    counts = [int(a or b) for a, b in SUMMARY.findall(log)]
    kinds = r"(?i)invalid|uninitialized|race|hazard|barrier|error"
    reports = [f[10:].strip() for f in findings if re.search(kinds, f) and "SUMMARY" not in f]
    if sum(counts):
        row |= {"state": "errors", "errors": sum(counts), "first": (reports or [""])[0][:300]}
    elif counts and "all calls done" in log:
        row |= {"state": "clean", "errors": 0}
    else:
        end = "out of time" if not ended else (log.strip().splitlines() or ["no output"])[-1][:300]
        row |= {"state": "not shown", "text": end, "first": (reports or [""])[0][:300]}
    return row


def main() -> int:
    rows, folder, _ = step_arguments("sanitizers")
    report = folder / "sanitizer.txt"
    report.write_text("")
    if not shutil.which("compute-sanitizer"):
        report.write_text("compute-sanitizer is not on the PATH\n")
        for tool in TOOLS:
            rows.add(tool, state="not shown", text="compute-sanitizer is not on the PATH")
        return 1
    scratch = Path(os.environ.get("ELSA_GPU_CHECK_SCRATCH", folder))
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def start(tool: str, options: Sequence[str]) -> tuple[subprocess.Popen, Path]:
        command = ["compute-sanitizer", "--tool", tool, *options]
        command += [sys.executable, "-W", "ignore", "-m", "gpu.driver", "small"]
        log = scratch / f"{tool}.log"
        with log.open("wb") as file:
            output = {"stdout": file, "stderr": subprocess.STDOUT}
            return subprocess.Popen(command, env=environment, **output), log

    running = {tool: start(tool, OPTIONS[tool]) for tool in TOOLS}
    plain: set[str] = set()
    clean = 0
    while running:
        for tool, (process, log) in list(running.items()):
            ended = process.poll() is not None
            if not ended and seconds_left() > 4:
                continue
            if not ended:
                process.terminate()
                try:
                    process.wait(1)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            text = log.read_text(errors="replace")
            if ended and tool not in plain and not CALL.search(text) and "option" in text:
                plain.add(tool)  # of another version, with other options
                running[tool] = start(tool, ())
                continue
            with report.open("a") as file:
                file.write(f"===== {tool}\n{text[-400_000:]}\n")
            row = judge(text, ended)
            rows.add(tool, **row)
            clean += row["state"] == "clean"
            del running[tool]
        time.sleep(0.2)
    return int(clean < len(TOOLS))


if __name__ == "__main__":
    sys.exit(main())
