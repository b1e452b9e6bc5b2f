"""A line that says how far a long step is, and files that move it."""

from __future__ import annotations

import sys
import time
from typing import IO, Any

# Bytes below which a step is over before anybody could read the line.
WORTH_SHOWING = 64 * 2**20


class Progress:
    """Prints "what: 40 % of 438 MB" over itself on a terminal; nothing where that makes no sense.

    Args:
        what: the step, e.g. "reading".
        total: bytes in all.
        show: None decides by ``total`` and by whether standard error is a terminal.
    """

    def __init__(self, what: str, total: int, show: bool | None = None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.show = (total >= WORTH_SHOWING and sys.stderr.isatty()) if show is None else show
        self.next = 0.0

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.show and now >= self.next:
            self.next = now + 0.1
            share = min(1.0, self.done / max(1, self.total))
            bar = "#" * int(24 * share)
            text = f"\r{self.what:8} [{bar:24}] {share:4.0%} of {self.total / 1e6:.0f} MB"
            print(text, end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.show and self.done:
            self.done, self.next = self.total, 0.0
            self.add(0)
            print(file=sys.stderr)


class CountedFile:
    """A binary file that reports what is read or written.

    Never allocates for more than there is to read, whatever it is asked for.
    """

    def __init__(self, file: IO[bytes], progress: Progress, size: int = 0) -> None:
        self.file, self.progress, self.size = file, progress, size

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.file.tell())
        data = self.file.read(left if count is None or count < 0 else min(count, left))
        self.progress.add(len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)  # type: ignore[attr-defined]
        self.progress.add(count)
        return count

    def readline(self, count: int = -1) -> bytes:
        return self.file.readline(count if count >= 0 else self.size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: Any) -> int:
        count = self.file.write(data)
        self.progress.add(count)
        return count

    def flush(self) -> None:
        self.file.flush()
