"""Ends a training between two iterations when a scheduler asks for it, in all its processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import util
from types import FrameType
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader

# What a scheduler sends before it kills: SIGTERM, or with Slurm's --signal USR1@60 that one.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FAILED, REFUSED = 1, 2


class TrainingEnded(SystemExit):
    """Ends a run with an exit status and a sentence that says why.

    No Exception, so that no framework logs a trace of what is no mistake in a program.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(status)
        self.status, self.sentence = status, sentence


def resume_hint(checkpoint: str | None) -> str:
    """What follows the reason of an end: where --resume goes on, "" without a checkpoint."""
    return f"; --resume goes on from {checkpoint}" if checkpoint else ""


def ended_by_signal(number: int, checkpoint: str) -> TrainingEnded:
    """The end of a run after the signal of this number, with the state saved in ``checkpoint``.

    Its status is the one that a shell reports of a process which the signal has ended: 143 for
    SIGTERM, 138 for SIGUSR1.
    """
    name = signal.Signals(number).name
    return TrainingEnded(128 + number, f"stopped by {name}{resume_hint(checkpoint)}")


class StopSignals:
    """Notes SIGTERM and SIGUSR1, which would otherwise end the process, while a training runs.

    Attributes:
        received: number of the last of these signals, 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """From now on; only the main thread may, in others nothing changes."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)

    def close(self) -> None:
        """The signals do again what they did before `listen`."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def any_rank_got(self) -> int:
        """A signal that any process of the run has received, the same in all of them, or 0.

        A collective: each process calls it equally often.
        """
        return max_over_ranks(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


@contextmanager
def forward_to_children() -> Iterator[None]:
    """The process passes SIGTERM and SIGUSR1 on to those that it has started for a distributed run.

    Before it has, the signals do to this one what they did before.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        if children := multiprocessing.active_children():
            for child in children:
                if child.pid is not None:
                    os.kill(child.pid, number)
        else:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def max_over_ranks(number: int) -> int:
    """The largest of the numbers that the processes of a run call this with, in all of them."""
    if not distributed.is_available() or not distributed.is_initialized():
        return number
    device = "cuda" if "nccl" in distributed.get_backend() else "cpu"
    tensor = torch.tensor(number, device=device)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return int(tensor)


def shield_workers(loader: DataLoader[Any]) -> None:
    """Lets a loader's worker processes ignore the signals, which schedulers send to all processes.

    Without, the training would fail for want of its workers before it can save. Takes effect when
    the loader starts them; they end as ever when the loader or its process does.
    """
    closing = multiprocessing.RawValue("b", 0)
    # Runs before multiprocessing sends SIGTERM to the workers that are left, and waits for them.
    util.Finalize(None, setattr, args=(closing, "value", 1), exitpriority=10)
    loader.worker_init_fn = partial(_start_worker, closing=closing, before=loader.worker_init_fn)


def _start_worker(worker: int, closing: Any, before: Callable[[int], None] | None) -> None:
    def obey(number: int, frame: FrameType | None) -> None:
        if closing.value:  # the signal comes from the process that is about to end
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, obey)
    if before is not None:
        before(worker)
