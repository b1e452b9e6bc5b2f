"""Which steps there are, and how they run: one process for each part of one, with its own limit."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired

from . import summary


@dataclass
class Step:
    """A step: its time limit and the least time that it is begun with, in seconds, and its parts.

    ``beside``: it runs beside the next step, which may use the device, too. ``together``: its parts
    run at the same time.
    """

    limit: float
    least: float
    parts: tuple[str, ...] = ("",)
    beside: bool = False
    together: bool = False


FAMILIES = ("cuda", "triton", "torch")
STEPS = {
    "facts": Step(40, 5),
    "load": Step(170, 5),
    "probe": Step(120, 10, ("instructions", *FAMILIES, "conv"), together=True),
    "sanitizers": Step(150, 30, beside=True),
    "tests": Step(150, 30),
    "operator": Step(100, 20, ("cuda", "copy", "triton", "compiled")),
    "conv": Step(60, 15, ("heuristics", "benchmark")),
    "models": Step(120, 25, ("tiny", "small", "torch", "dense", "triton", "benchmark")),
    "ncu": Step(60, 20),
    "compile": Step(200, 30, ("backbones", "operator", "flex")),
}
RESERVE = 4.0
"""Seconds kept for the summary."""


class Running:
    """A part of a step in a process group of its own, which ends at its limit."""

    def __init__(self, command: list[str], place: Path, environment: dict[str, str], log: Path):
        self.started = time.monotonic()
        with log.open("ab") as file:
            self.process = Popen(
                command,
                cwd=place,
                env=environment,
                stdout=file,
                stderr=STDOUT,
                stdin=DEVNULL,
                start_new_session=True,
            )

    def wait(self, end: float) -> str:
        """Returns "done", "failed: ..." or "out of time"."""
        try:
            status = self.process.wait(max(0.1, end - time.monotonic()))
        except TimeoutExpired:
            self.stop()
            return "out of time"
        self._kill(signal.SIGKILL)  # what it has left running
        if status == 0:
            return "done"
        return f"failed: signal {-status}" if status < 0 else f"failed: status {status}"

    def stop(self) -> None:
        """Interrupts the group, so that its tools write what they know, then kills it."""
        self._kill(signal.SIGTERM)
        try:
            self.process.wait(2)
        except TimeoutExpired:
            pass
        self._kill(signal.SIGKILL)
        self.process.wait()

    def _kill(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass


class Schedule:
    """Runs steps one after the other, within ``seconds``.

    Args:
        folder: of the results.
        scratch: for files that are not results.
        place: the folder that has elsa_core.
        environment: of the steps.
    """

    FILES = ("summary.md", "rows.jsonl", "machine.json", "tests.xml", "sanitizer.txt")
    FILES += ("profile.txt", "ncu.csv", "log.txt")

    def __init__(
        self, folder: Path, scratch: Path, place: Path, environment: dict[str, str], seconds: float
    ) -> None:
        self.folder, self.scratch, self.place = folder, scratch, place
        self.environment = environment
        self.end = time.monotonic() + seconds
        for name in ("rows.jsonl", "log.txt"):
            (folder / name).touch()

    def run(self, names: Iterable[str]) -> int:
        """Returns the exit status."""
        waiting: list[tuple[str, Running, float, str]] = []
        names = list(names)
        try:
            for name in STEPS:
                if name not in names:
                    continue
                step = STEPS[name]
                if waiting and name != "tests":
                    self.finish(waiting)
                left = self.end - RESERVE - time.monotonic()
                if left < step.least:
                    self.note(name, "skipped", 0, f"needs {step.least:g} s, {left:.0f} s remain")
                    continue
                end = time.monotonic() + min(step.limit, left)
                if step.beside:
                    waiting.append((name, self.begin(name, "", end), end, ""))
                else:
                    self.run_parts(name, step, end)
            self.finish(waiting)
        finally:
            for _, running, _, _ in waiting:
                running.stop()
        rehearsal = "ELSA_GPU_CHECK_REHEARSAL" in self.environment
        text, status = summary.write(self.folder, names, rehearsal)
        print(text, flush=True)
        print(*summary.verdicts(text), sep="\n", flush=True)
        return status

    def begin(self, name: str, part: str, end: float) -> Running:
        print(f"{name} {part}".strip(), flush=True)
        command = [sys.executable, "-W", "ignore", "-m", f"gpu.{name}", "--out", str(self.folder)]
        command += ["--part", part] if part else []
        environment = {
            **self.environment,
            "ELSA_GPU_CHECK_END": str(end),
            "ELSA_GPU_CHECK_SCRATCH": str(self.scratch),
            "PYTHONUNBUFFERED": "1",
        }
        with (self.folder / "log.txt").open("a") as file:
            file.write(f"\n===== {name} {part}\n")
        return Running(command, self.place, environment, self.folder / "log.txt")

    def run_parts(self, name: str, step: Step, end: float) -> None:
        """Gives each part the time that is left, divided by the parts, and half as much again."""
        if step.together:
            self.finish([(name, self.begin(name, part, end), end, part) for part in step.parts])
            return
        for index, part in enumerate(step.parts):
            left = end - time.monotonic()
            share = left / (len(step.parts) - index) * 1.5
            if left < 1:
                self.note(name, "skipped", 0, "no time is left of the step", part)
                continue
            limit = time.monotonic() + min(left, share)
            running = self.begin(name, part, limit)
            state, _, text = running.wait(limit).partition(": ")
            self.note(name, state, time.monotonic() - running.started, text, part)

    def finish(self, waiting: list[tuple[str, Running, float, str]]) -> None:
        try:
            while waiting:
                name, running, end, part = waiting[0]
                state, _, text = running.wait(end).partition(": ")
                waiting.pop(0)
                self.note(name, state, time.monotonic() - running.started, text, part)
        finally:
            for _, running, _, _ in waiting:
                running.stop()

    def note(self, name: str, state: str, seconds: float, text: str, part: str = "") -> None:
        row = {"step": name, "case": "step", "part": part, "state": state}
        row |= {"seconds": round(seconds, 1), "text": text}
        with (self.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if state != "done":
            print(f"{name} {part}: {state} {text}".replace(" :", ":"), flush=True)
