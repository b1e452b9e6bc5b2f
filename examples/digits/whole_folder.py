"""Folders that appear whole or not at all: written in a temporary sibling, then renamed."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`, on the same file system, to be handed to `publish`.

    It lies in `.NAME.partial`, which is locked while the block runs and removed afterwards; what a
    killed run left there is removed first. Raises OSError where the place cannot be written or
    another process is at work on the same target.
    """
    home = target.with_name(f".{target.name}.partial")
    lock = _lock(home, target)
    try:
        _clear(home, keep="lock")
        new = home / "new"
        new.mkdir()
        yield new
    finally:
        with suppress(OSError):
            _clear(home, keep="lock")
            (home / "lock").unlink()
            home.rmdir()
        os.close(lock)


def publish(new: Path, target: Path) -> None:
    """Puts the workspace folder `new` at `target`, in place of a folder that is there."""
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


def _lock(home: Path, target: Path) -> int:
    while True:
        home.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # a run that ends has just removed `home`
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(home / "lock")):
                    return lock
        except BlockingIOError:
            os.close(lock)
            raise OSError(errno.EBUSY, "another run is writing it now", str(target)) from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # the file was removed between opening and locking: try again


def _clear(home: Path, keep: str) -> None:
    for entry in home.iterdir():
        if entry.name == keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
