"""Folders that appear whole or not at all: written in a temporary sibling, then renamed."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``target``, on the same file system, for `publish`.

    It lies in `.NAME.partial`, which is locked while the block runs and removed afterwards; what a
    killed run left there is removed first. Raises OSError where the place cannot be written or
    another process is writing the same target.
    """
    home = target.with_name(f".{target.name}.partial")
    lock = FileLock(home / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(errno.EBUSY, "another run is writing it now", str(target)) from None
    try:
        new = home / "new"
        for folder in (new, home / "old"):
            shutil.rmtree(folder, ignore_errors=True)
        new.mkdir()
        yield new
    finally:
        shutil.rmtree(home, ignore_errors=True)
        lock.release()


def publish(new: Path, target: Path) -> None:
    """Puts the workspace folder ``new`` at ``target``, in place of a folder that is there."""
    old = new.with_name("old")
    replaces = target.exists()
    if replaces:
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if replaces:
            old.rename(target)
        raise
