"""Runs a training of the demo: shows its progress, resumes it, and skips it when finished."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing

from .trainings import REPOSITORY, Training

POLL_SECONDS = 1.0
LOG_LINES = 15


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def fingerprint(data: Path) -> str:
    """A hash of configs and data set; results of another fingerprint are stale."""
    digest = hashlib.sha256((data / "meta.json").read_bytes())
    for path in sorted(REPOSITORY.glob("configs/**/*")):
        if path.suffix in (".py", ".yaml"):
            digest.update(path.relative_to(REPOSITORY).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


class Run:
    """One training in its folder; finished, half done or not begun."""

    def __init__(self, training: Training, out: Path, fingerprint: str) -> None:
        self.training = training
        self.out = out / training.name
        self.fingerprint = fingerprint
        self._state_path = self.out / "demo_state.json"

    def state(self) -> dict[str, Any]:
        """The state of earlier attempts: seconds spent, and whether the training is finished."""
        if self._state_path.is_file():
            state: dict[str, Any] = json.loads(self._state_path.read_text())
            if state["fingerprint"] == self.fingerprint:
                return state
        return {"fingerprint": self.fingerprint, "seconds": 0.0, "finished": False}

    def prepare(self) -> None:
        """Empties a folder with results of other configs or data; refuses any other folder."""
        if self.out.is_dir() and any(self.out.iterdir()):
            if not self._state_path.is_file():
                raise UsageError(
                    f"{self.out} holds files that the demo did not write: move them, or name "
                    "another folder with DEMO_ARGS='--out FOLDER'"
                )
            if json.loads(self._state_path.read_text())["fingerprint"] != self.fingerprint:
                shutil.rmtree(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self._state_path, self.state())

    def __call__(self) -> None:
        """Trains and evaluates unless that is done; resumes from the last checkpoint, if any."""
        self.prepare()
        state = self.state()
        title = f"{self.training.framework}, {self.training.task}"
        if state["finished"]:
            print(f"{title}: done before, in {state['seconds']:.0f} s", flush=True)
            return
        resume = self.training.checkpoint(self.out) is not None
        log = self.out / "log.txt"
        begin, spent = time.monotonic(), state["seconds"]
        try:
            with log.open("a") as stream:
                process = subprocess.Popen(
                    self.training.command(self.out, resume),
                    cwd=REPOSITORY,
                    env=self.training.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
                try:
                    self._watch(process, title + (" (resumed)" if resume else ""))
                finally:
                    if process.poll() is None:
                        process.terminate()
                        process.wait()
        finally:
            state["seconds"] = spent + time.monotonic() - begin
            write_json(self._state_path, state)
        if process.returncode:
            with log.open(errors="replace") as stream:
                print(*deque(stream, LOG_LINES), sep="", file=sys.stderr)
            raise UsageError(
                f"{title} failed with exit status {process.returncode}, the end of {log} is above: "
                "fix what it names and repeat the command, which resumes from the last checkpoint"
            )
        missing = set(self.training.metrics.values()) - set(self.final_metrics())
        if missing:
            raise UsageError(f"{title} ended without its {', '.join(sorted(missing))}: see {log}")
        state["finished"] = True
        write_json(self._state_path, state)

    def final_metrics(self) -> dict[str, float]:
        return self.training.curves(self.out).final

    def _watch(self, process: subprocess.Popen[bytes], title: str) -> None:
        bar_format = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        interval = 0.5 if sys.stderr.isatty() else 20
        with tqdm(
            desc=title,
            total=self.training.iterations(),
            bar_format=bar_format,
            mininterval=interval,
            maxinterval=interval,
        ) as bar:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                self._show(bar)
            self._show(bar)

    def _show(self, bar: "tqdm[Any]") -> None:
        curves = self.training.curves(self.out)
        figures = {name: f"{value:.1f}" for name, value in curves.final.items()}
        if curves.loss:
            bar.n = min(max(curves.loss) + 1, bar.total)
            figures = {"loss": f"{curves.loss[max(curves.loss)]:.3f}", **figures}
        bar.set_postfix(figures, refresh=False)
        bar.update(0)
        if sys.stderr.isatty():
            bar.refresh()
