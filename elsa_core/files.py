"""Files that a kill at any moment, a full disk or a second writer leaves whole.

What is written has a name of its own in the same folder until it is complete,
``.NAME.BOOT-PROCESS-RANDOM.part``, and is then renamed. An exception removes that file, and so does
each signal that can be caught and would end the process; after SIGKILL or a power cut, the next
process that writes the same file does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import atomic
from .errors import UsageError


@contextmanager
def replacing(path: str | os.PathLike[str], *, sweeping: bool = True) -> Iterator[Any]:
    """A binary file to write to, which takes the place of ``path`` when all went well.

    A file that is there keeps its permissions. A symbolic link is replaced and what it names stays
    as it is. Devices and pipes, such as /dev/stdout, are written to directly.

    Args:
        sweeping: looks for what killed processes have left of the same file. That lists the folder;
            whoever writes thousands of files can call `sweep` once instead.

    Raises UsageError, with the system's reason, where ``path`` cannot be written; what was there
    before stays.
    """
    path = os.fspath(path)
    with _saying(path), atomic.replacing(path, sweeping=sweeping) as file:
        yield file


@contextmanager
def replacing_by_name(path: str | os.PathLike[str]) -> Iterator[str]:
    """As `replacing`, for libraries that open a file themselves: the name of an empty file, which
    has the ending of ``path``."""
    path = os.fspath(path)
    with _saying(path), atomic.replacing_by_name(path) as name:
        yield name


def sweep(folder: str | os.PathLike[str]) -> None:
    """Removes what processes of this machine that were killed have left of files in a folder."""
    atomic.sweep(os.fspath(folder))


@contextmanager
def _saying(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
