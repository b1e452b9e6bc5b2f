"""Progress bars of long reads and writes: on terminals, where tqdm is installed."""

from __future__ import annotations

import io
from typing import Any

# Bytes below which a step is over before anybody could read the bar.
WORTH_SHOWING = 64 * 2**20


def progress_bar(what: str, size: int) -> Any:
    """A bar of ``size`` bytes with tqdm's `update` and `close`."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _NoBar()
    disable = None if size >= WORTH_SHOWING else True  # None: where there is no terminal
    return tqdm(desc=what, total=size, unit="B", unit_scale=True, disable=disable)


class CountedFile(io.RawIOBase):
    """A binary file whose reads and writes move a bar.

    It has no descriptor: `torch.load` reads through this object, not around it. Closing it closes
    the bar; the file stays open.
    """

    def __init__(self, file: Any, what: str, size: int) -> None:
        self.file, self.bar = file, progress_bar(what, size)

    def readable(self) -> bool:
        return self.file.readable()

    def writable(self) -> bool:
        return self.file.writable()

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.file.readinto(buffer)
        self.bar.update(count)
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: Any) -> int:
        count = self.file.write(data)
        self.bar.update(count)
        return count

    def close(self) -> None:
        self.bar.close()
        super().close()


class _NoBar:
    def update(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass
