"""Runs a framework's command line as a process that ends when this one does."""

from __future__ import annotations

import ctypes
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired

from elsa_core.runtime.errors import UsageError

POLL_SECONDS = 0.5
# Seconds that a process has to save its state after SIGTERM.
PATIENCE = 120
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
# What the command lines and Python itself begin a last line with.
SENTENCE = re.compile(r"^(?:train_net|train|test): (.+)$|^(\w[\w.]*(?:Error|Exception).*)$", re.M)


def run(command: Sequence[str], log: Path, what: str, watch: Callable[[], None]) -> None:
    """Run a command; what it prints is appended to a file.

    The process is not of this terminal's group, so that Ctrl-C reaches it as SIGTERM, which saves
    the state. It gets SIGTERM, too, if this process is killed.

    Args:
        what: it is, in messages.
        watch: called while the command runs, and at its end.

    Raises:
        UsageError: with the last sentence of a command that failed.
    """
    begin = log.stat().st_size if log.exists() else 0
    with log.open("ab") as stream:
        process = Popen(
            command,
            stdin=DEVNULL,
            stdout=stream,
            stderr=STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(POLL_SECONDS)
                except TimeoutExpired:
                    watch()
        finally:
            if process.poll() is None:
                _end(process)
    watch()
    if process.returncode:
        said = tail(log, begin)
        found = [one or other for one, other in SENTENCE.findall(said)]
        why = found[-1] if found else f"exit status {process.returncode}"
        raise UsageError(f"{what} failed: {why} (its log is {log})")


def tail(log: Path, begin: int) -> str:
    """Return what a log has from a byte on."""
    with log.open("rb") as stream:
        stream.seek(begin)
        return stream.read().decode(errors="replace")


def _end(process: Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE)
    except (TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
