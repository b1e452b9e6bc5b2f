"""Atomic writes: a kill, a full disk or a second writer leaves the old file or the new one.

Data goes to a temporary file in the same folder, ``.NAME.BOOT-PROCESS-RANDOM.part``, which is
renamed when it is complete. An exception or a signal that can be caught removes the temporary file.
After SIGKILL or a power cut, the next process that writes the same target removes it.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import secrets
import shutil
import signal
import stat
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, Any

from .errors import UsageError

# Parts of a temporary file's name: the target's name, cut to LABEL_BYTES; machine boot, process and
# a random number; the target's ending if the writer chooses the format by it.
LABEL_BYTES = 100
TEMPORARY = re.compile(r"\.(.*)\.([0-9a-f]{8})-[0-9]+-[0-9a-f]{8}\.part(\.[^.]*)?", re.DOTALL)
# Seconds without a write after which a temporary file of another machine, or from before a restart,
# counts as abandoned. Locks do not tell: some network file systems do not share them.
ABANDONED = 24 * 3600
# Signals that end a process by default. Ctrl-C normally raises an exception instead.
SIGNALS = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGXCPU,
)
# Error numbers of file systems that cannot sync a folder.
NO_FOLDER_SYNC = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)

_unfinished: dict[str, int] = {}  # temporary file -> process that writes it


class Remembering:
    """A writable file that remembers the exception of a failed write, which torch.save drops."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def replacing(path: str | os.PathLike[str], *, sweeping: bool = True) -> Iterator[Any]:
    """Open a binary file for writing that replaces ``path`` when the block succeeds.

    The new file keeps the permissions of the old one. A symbolic link is replaced; its target does
    not change. Devices and pipes, such as /dev/stdout, are written directly.

    Args:
        sweeping: remove temporary files that killed processes left of the same target. This lists
            the folder: to write thousands of files, call `sweep` once instead.

    Raises:
        UsageError: ``path`` cannot be written. The message has the system's reason, and an existing
            file does not change.
    """
    path, file = os.fspath(path), None
    with _naming(path):
        try:
            with _beside(path, "", sweeping) as (target, _):
                with open(target, "wb", closefd=target == path) as raw:
                    yield (file := Remembering(raw))
        except BaseException as error:
            if file is not None and file.error:
                raise file.error from error
            raise


@contextmanager
def replacing_by_name(path: str | os.PathLike[str]) -> Iterator[str]:
    """Variant of `replacing` for libraries that open files themselves.

    Yields the name of an empty file with the ending of ``path``.
    """
    path = os.fspath(path)
    with _naming(path), _beside(path, os.path.splitext(path)[1], True) as (_, name):
        yield name


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Yield the name of a new folder. It is removed at the end, also after a signal."""
    folder = tempfile.mkdtemp()
    with _removing(folder):
        yield folder


def make_folder(path: str, name: str) -> None:
    """Creates a folder; raises UsageError, which calls it ``name``, if it cannot be written."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UsageError(f"{name} {path} cannot be written: {error.strerror}") from error


def sweep(
    folder: str | os.PathLike[str], label: str | None = None, own: str = "", now: float = 0
) -> None:
    """Remove temporary files of dead processes.

    A process holds a lock on its file, which the system releases when the process ends. Files of
    other machines must also be `ABANDONED`.

    Args:
        label: start of the target's name, as in the temporary file's; None for all targets.
        own: temporary file of this process, which is kept.
        now: current time of the folder's file system; 0 keeps all files of other machines.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(f".{label or ''}")]
        for name in names:
            found = TEMPORARY.fullmatch(name)
            if found and label in (None, found[1]) and name != own:
                with suppress(OSError):
                    _remove_if_dead(os.path.join(folder, name), found[2] == _boot(), now)


def in_place(path: str) -> bool:
    """Whether ``path`` must be written directly: a pipe, a device, or a link into /proc, such as
    /dev/stdout. Also true for a folder, which fails with the right error when it is opened."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return True
        if os.path.islink(path):
            path = os.path.join(os.path.dirname(path), os.readlink(path))
    except OSError:
        return False
    return os.path.realpath(os.path.dirname(path)).startswith("/proc/")


def lock(descriptor: int) -> bool | None:
    """Lock a file while it is open. Return False if another process holds the lock, and None if
    the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _beside(path: str, ending: str, sweeping: bool) -> Iterator[tuple[int | str, str]]:
    """Yield descriptor and name of a temporary file that replaces ``path`` at the end, or ``path``
    twice if it must be written directly."""
    if in_place(path):
        yield path, path
        return
    folder, target = os.path.split(path)
    folder = folder or os.curdir
    old = _permissions(path)
    label = os.fsencode(target)[:LABEL_BYTES].decode(errors="ignore")
    descriptor = -1
    while descriptor < 0:
        unique = f"{_boot()}-{os.getpid()}-{secrets.token_hex(4)}"
        name = os.path.join(folder, f".{label}.{unique}.part{ending}")
        with _removing(name):
            descriptor = _create(name, 0o666 if old is None else 0o600)
            if descriptor < 0:
                continue
            try:
                if sweeping:
                    sweep(folder, label, os.path.basename(name), os.fstat(descriptor).st_mtime)
                yield descriptor, name
                if old is not None and stat.S_IMODE(os.fstat(descriptor).st_mode) != old:
                    os.fchmod(descriptor, old)
                os.fsync(descriptor)
                os.replace(name, path)
                _sync_folder(folder)
            finally:
                os.close(descriptor)


def _permissions(path: str) -> int | None:
    """Return the permissions of an existing file, or None. OSError if the name is impossible."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_mode & 0o777 if stat.S_ISREG(found.st_mode) else None


def _create(name: str, permissions: int) -> int:
    """Create and lock a file; return -1 if another process swept it away in between."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, permissions)
    if lock(descriptor) is False or not os.fstat(descriptor).st_nlink:
        os.close(descriptor)
        return -1
    return descriptor


@contextmanager
def _removing(name: str) -> Iterator[None]:
    """Remove a file or folder at the end of the block, also after an exception or a signal."""
    handled = []
    _unfinished[name] = os.getpid()
    try:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, _die)
                    handled.append(number)
        yield
    finally:
        _remove(name)
        for number in handled:
            if signal.getsignal(number) == _die:
                signal.signal(number, signal.SIG_DFL)
        del _unfinished[name]


def _die(number: int, frame: FrameType | None) -> None:
    """Remove this process's temporary files, then let the signal end the process."""
    for name, process in list(_unfinished.items()):
        if process == os.getpid():
            _remove(name)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _remove(name: str) -> None:
    """Remove a file or folder, which may be gone: it has been renamed."""
    try:
        os.remove(name)
    except IsADirectoryError:
        shutil.rmtree(name, ignore_errors=True)
    except OSError:
        pass


def _remove_if_dead(name: str, same_boot: bool, now: float) -> None:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(name, flags)
    try:
        found = os.fstat(descriptor)
        old = same_boot or now - found.st_mtime > ABANDONED
        if stat.S_ISREG(found.st_mode) and old and lock(descriptor):
            os.remove(name)
    finally:
        os.close(descriptor)


def _sync_folder(folder: str) -> None:
    """Write the new name to the disk, so that it survives a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


@functools.cache
def _boot() -> str:
    """Eight hexadecimal digits for this boot of the machine, the same in all its containers."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read(8)
    except OSError:
        return f"{zlib.crc32(os.uname().nodename.encode()):08x}"
