"""One training at a time in a folder.

Two would overwrite each other's checkpoints, and --resume could not tell them apart.
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
    """Keeps other trainings out of a folder; a second lock of one process changes nothing.

    The first process of a distributed run holds it for all. The system releases it with the
    process, however that ends; processes that it forks, such as workers that load data, do not
    keep it. Where the file system has no locks, a warning says so.

    Args:
        folder: made where it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self._key = ""

    def acquire(self) -> None:
        """A collective; raises UsageError, which names the owner, where another training has the
        lock, in all processes of this one, and where the training could not note its checkpoints.
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
        """Does nothing without a lock of its own."""
        if held := _held.pop(self._key, None):
            self._key = ""
            with suppress(OSError):
                os.remove(held.path)  # before the lock ends: afterwards it may be another's
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
        """The descriptor of the locked file; BlockingIOError where another has locked it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        while True:
            descriptor = os.open(path, flags, 0o666)
            locked = files.lock(descriptor)
            if locked is None:
                logger.warning(
                    f"the file system of {self.folder} has no locks: make sure that no other "
                    "training uses this folder"
                )
            # It is another file where an owner that has just ended has removed its own.
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
    """A forked process has the open files, too, and with them the lock: it would outlive its
    owner."""
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
