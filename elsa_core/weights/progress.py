"""A line that says how far a long step is, and files that move it."""

from __future__ import annotations

import io
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


class CountedFile(io.RawIOBase):
    """A binary file that reports what is read or written.

    It has no descriptor: `torch.load` reads through this object, not around it.
    """

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        self.file, self.progress = file, progress

    def readable(self) -> bool:
        return self.file.readable()

    def writable(self) -> bool:
        return self.file.writable()

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)  # type: ignore[attr-defined]
        self.progress.add(count)
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: Any) -> int:
        count = self.file.write(data)
        self.progress.add(count)
        return count

    def close(self) -> None:
        """Ends the line of the progress; the file stays open."""
        if not self.closed:
            self.progress.close()
        super().close()
