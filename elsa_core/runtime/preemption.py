"""End a training in all processes, between two iterations, when a scheduler preempts it."""

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

# Sent by schedulers before they kill: SIGTERM, or SIGUSR1 with Slurm's --signal USR1@60.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FAILED, REFUSED = 1, 2


class TrainingEnded(SystemExit):
    """Ends a run with an exit status and a sentence that says why.

    It derives from SystemExit, so that frameworks log no traceback.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(status)
        self.status, self.sentence = status, sentence


def resume_hint(checkpoint: str | None) -> str:
    """Return a clause that names the checkpoint that --resume uses, "" without one."""
    return f"; --resume continues from {checkpoint}" if checkpoint else ""


def ended_by_signal(number: int, checkpoint: str) -> TrainingEnded:
    """Return the exception that ends a run after a signal, with its state saved in ``checkpoint``.

    The status is the one that a shell reports for the signal: 143 for SIGTERM, 138 for SIGUSR1.
    """
    name = signal.Signals(number).name
    return TrainingEnded(128 + number, f"stopped by {name}{resume_hint(checkpoint)}")


class StopSignals:
    """Records SIGTERM and SIGUSR1 during a training instead of letting them end the process.

    Attributes:
        received: number of the last signal received, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Start recording. Does nothing outside the main thread, which alone may set handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)

    def close(self) -> None:
        """Restore the signal handlers from before `listen`."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def any_rank_got(self) -> int:
        """Return a signal that any rank has received, the same in all ranks, or 0.

        A collective: all ranks must call it.
        """
        return max_over_ranks(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


@contextmanager
def forward_to_children() -> Iterator[None]:
    """Forward SIGTERM and SIGUSR1 to the child processes of a distributed run.

    While there are no children, the signals act on this process as usual.
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
    """Return the maximum of ``number`` over all ranks. A collective."""
    if not distributed.is_available() or not distributed.is_initialized():
        return number
    device = "cuda" if "nccl" in distributed.get_backend() else "cpu"
    tensor = torch.tensor(number, device=device)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return int(tensor)


def shield_workers(loader: DataLoader[Any]) -> None:
    """Make a loader's workers ignore the signals, which schedulers send to all processes.

    Otherwise the training would lose its workers before it can save. Call it before the loader
    starts its workers; they still end with the loader or its process.
    """
    closing = multiprocessing.RawValue("b", 0)
    # Runs before multiprocessing sends SIGTERM to the remaining workers and waits for them.
    util.Finalize(None, setattr, args=(closing, "value", 1), exitpriority=10)
    loader.worker_init_fn = partial(_start_worker, closing=closing, before=loader.worker_init_fn)


def _start_worker(worker: int, closing: Any, before: Callable[[int], None] | None) -> None:
    def obey(number: int, frame: FrameType | None) -> None:
        if closing.value:  # the parent process is ending and has sent the signal
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, obey)
    if before is not None:
        before(worker)
