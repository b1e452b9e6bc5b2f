"""Files that a kill at any moment, a full disk or a second writer leaves whole.

What is written has a name of its own in the same folder until it is complete,
``.NAME.BOOT-PROCESS-RANDOM.part``, and is then renamed. An exception removes that file, and so does
each signal that can be caught and would end the process; after SIGKILL or a power cut, the next
process that writes the same file does.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import secrets
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

# A temporary file's name: the target's, cut so that none becomes too long; the boot of the machine,
# the process and a random part; an ending where the writer chooses the format by it.
LABEL_BYTES = 100
TEMPORARY = re.compile(r"\.(.*)\.([0-9a-f]{8})-[0-9]+-[0-9a-f]{8}\.part(\.[^.]*)?", re.DOTALL)
# Seconds without a write after which a file of another machine, or from before a restart, is taken
# for abandoned. Whether its process lives cannot be asked: not every network file system hands
# locks on.
ABANDONED = 24 * 3600
# What ends a process that does not handle it; Ctrl-C is an exception already.
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
# What a system says of a folder whose names cannot be written to the disk on demand.
NO_FOLDER_SYNC = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)

_unfinished: dict[str, int] = {}  # the temporary files, and the process that writes each


class Remembering:
    """A file to write to that keeps the reason for a failure, or Ctrl-C, which torch.save drops."""

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
def replacing(path: str | os.PathLike[str], *, sweeping: bool = True) -> Iterator[Remembering]:
    """A binary file to write to, which takes the place of ``path`` when all went well.

    A file that is there keeps its permissions. A symbolic link is replaced and what it names stays
    as it is. Devices and pipes, such as /dev/stdout, are written to directly.

    Args:
        sweeping: looks for what killed processes have left of the same file. That lists the folder;
            whoever writes thousands of files can call `sweep` once instead.

    Raises UsageError, with the system's reason, where ``path`` cannot be written; what was there
    before stays.
    """
    path, file = os.fspath(path), None
    with _naming(path):
        try:
            if in_place(path):
                with open(path, "wb") as raw:
                    yield (file := Remembering(raw))
                return
            with _beside(path, "", sweeping) as (descriptor, _):
                with open(descriptor, "wb", closefd=False) as raw:
                    yield (file := Remembering(raw))
        except BaseException as error:
            if file is not None and file.error:
                raise file.error from error
            raise


@contextmanager
def replacing_by_name(path: str | os.PathLike[str]) -> Iterator[str]:
    """As `replacing`, for libraries that open a file themselves: the name of an empty file, which
    has the ending of ``path``."""
    path = os.fspath(path)
    with _naming(path):
        if in_place(path):
            yield path
            return
        with _beside(path, os.path.splitext(path)[1], True) as (_, name):
            yield name


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
    """Removes temporary files whose processes are dead.

    Their locks tell: the system releases them with the process. Files of other machines must be
    `ABANDONED`, too.

    Args:
        label: of the targets, None for all.
        own: the name of the file that this process writes.
        now: the time of the folder's file system; 0 leaves the files of other machines alone.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(f".{label or ''}")]
        for name in names:
            found = TEMPORARY.fullmatch(name)
            if found and label in (None, found[1]) and name != own:
                with suppress(OSError):
                    _remove_if_dead(os.path.join(folder, name), found[2] == _boot(), now)


def in_place(path: str) -> bool:
    """Whether nothing can take the place of a file: of a pipe, a device, or what /proc names, such
    as /dev/stdout. A folder is none that can be written either, and opening it says so."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return True
        if os.path.islink(path):
            path = os.path.join(os.path.dirname(path), os.readlink(path))
    except OSError:
        return False
    return os.path.realpath(os.path.dirname(path)).startswith("/proc/")


def lock(descriptor: int) -> bool | None:
    """Locks an open file for as long as it is open; False where another has, None where the file
    system cannot."""
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
def _beside(path: str, ending: str, sweeping: bool) -> Iterator[tuple[int, str]]:
    """A new file in the folder of ``path`` that takes its place at the end: descriptor and name."""
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
    """Of the file that is replaced, None where there is none; OSError for an impossible name."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_mode & 0o777 if stat.S_ISREG(found.st_mode) else None


def _create(name: str, permissions: int) -> int:
    """A new and locked file; -1 where `sweep` of another process came first."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, permissions)
    if lock(descriptor) is False or not os.fstat(descriptor).st_nlink:
        os.close(descriptor)
        return -1
    return descriptor


@contextmanager
def _removing(name: str) -> Iterator[None]:
    """Removes a file at the end, also where an exception or a signal is the end."""
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
        with suppress(OSError):  # it has taken its place
            os.remove(name)
        for number in handled:
            if signal.getsignal(number) == _die:
                signal.signal(number, signal.SIG_DFL)
        del _unfinished[name]


def _die(number: int, frame: FrameType | None) -> None:
    """The signal does what it did before, but no temporary file is left."""
    for name, process in list(_unfinished.items()):
        if process == os.getpid():
            with suppress(OSError):
                os.remove(name)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


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
    """So that the new name, too, outlives a power cut."""
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
    """Eight digits of this machine since it was started, the same in all its containers."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read(8)
    except OSError:
        return f"{zlib.crc32(os.uname().nodename.encode()):08x}"
