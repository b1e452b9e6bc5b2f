"""Files that a kill at any moment, or a full disk, leaves whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from .errors import UsageError


class _Remembering:
    """A file to write to that keeps the system's reason for a failure, which torch.save drops."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A binary file to write to, which takes the place of ``path`` when all went well.

    Until then it is ``path`` + ".part" on the same disk, which the next attempt overwrites.

    Raises UsageError, with the system's reason, where ``path`` cannot be written; what was there
    before stays.
    """
    path = os.fspath(path)
    temporary = f"{path}.part"
    file = None
    try:
        with open(temporary, "wb") as raw:
            file = _Remembering(raw)
            yield file
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
        _sync_folder(os.path.dirname(path) or ".")
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        cause = file.error if file is not None and file.error else error
        if isinstance(cause, OSError):
            raise UsageError(f"{path} cannot be written: {cause.strerror or cause}") from error
        raise


def _sync_folder(folder: str) -> None:
    """So that the new name, too, outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
