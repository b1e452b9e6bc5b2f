"""Allow one training at a time in a folder.

Two trainings would overwrite each other's checkpoints, and --resume could not tell them apart.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from torch import distributed

from . import files
from .errors import UsageError
from .preemption import max_over_ranks

NAME = ".training.lock"
_OWNER = re.compile(r"process [0-9]+ on [\w.-]+ since [0-9: -]+")
logger = logging.getLogger(__name__)


class _Held(NamedTuple):
    descriptor: int
    path: str


_held: dict[str, _Held] = {}  # by folder, in this process


class TrainingLock:
    """Keeps other trainings out of a folder. Locking twice in one process has no effect.

    Rank 0 of a distributed run holds the lock for all ranks. The system releases it when that
    process ends for any reason; forked processes, such as data loading workers, do not inherit it.
    On a file system without locks, acquiring it only logs a warning.

    Args:
        folder: created if missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self._key = ""

    def acquire(self) -> None:
        """Acquire the lock. A collective: all ranks must call it.

        Raises:
            UsageError: in all ranks, if another training holds the lock (the message names its
                process), or if the folder cannot be locked or hold `last_checkpoint`.
        """
        note = os.path.join(self.folder, "last_checkpoint")
        if os.path.isdir(note):
            raise UsageError(f"{note} must be a file, which a training writes, got a directory")
        problem: OSError | None = None
        if _is_first():
            try:
                self._acquire()
            except OSError as error:
                problem = error
        if not max_over_ranks(problem is not None):
            return
        if problem is not None and not isinstance(problem, BlockingIOError):
            reason = problem.strerror or problem
            raise UsageError(f"{self.folder} cannot be locked for a training: {reason}")
        raise UsageError(
            f"{self.folder} is in use by another training{self._owner()}: wait for its end, or "
            "train in another folder"
        )

    def release(self) -> None:
        """Release the lock if this object acquired it."""
        if held := _held.pop(self._key, None):
            self._key = ""
            with suppress(OSError):
                os.remove(held.path)  # before unlocking: afterwards another training may own it
            os.close(held.descriptor)

    def __enter__(self) -> TrainingLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _acquire(self) -> None:
        os.makedirs(self.folder, exist_ok=True)
        key = os.path.realpath(self.folder)
        if key not in _held:
            path = os.path.join(key, NAME)
            _held[key], self._key = _Held(self._open(path), path), key
            files.sweep(key)

    def _open(self, path: str) -> int:
        """Return the descriptor of the locked file. BlockingIOError if another process has it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        while True:
            descriptor = os.open(path, flags, 0o666)
            locked = files.lock(descriptor)
            if locked is None:
                logger.warning(
                    f"the file system of {self.folder} has no locks: make sure that no other "
                    "training uses this folder"
                )
            # The path names another file if the previous owner has just removed its own.
            if locked is not False and _is(descriptor, path):
                break
            os.close(descriptor)
            if locked is False:
                raise BlockingIOError
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        owner = f"process {os.getpid()} on {os.uname().nodename} since {now}\n"
        os.write(descriptor, owner.encode())
        return descriptor

    def _owner(self) -> str:
        try:
            descriptor = os.open(os.path.join(self.folder, NAME), os.O_RDONLY | os.O_NOFOLLOW)
            with open(descriptor, errors="replace") as file:
                found = _OWNER.match(file.read(400))
        except OSError:
            return ""
        return f" ({found[0]})" if found else ""


def _is_first() -> bool:
    together = distributed.is_available() and distributed.is_initialized()
    return not together or distributed.get_rank() == 0


def _is(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _forget() -> None:
    """Close the inherited files in a forked process, or the lock would outlive its owner."""
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
