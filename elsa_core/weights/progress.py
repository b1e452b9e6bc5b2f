"""Progress bars for long reads and writes, shown on terminals if tqdm is installed."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

# Below this number of bytes, a step ends before anybody could read the bar.
WORTH_SHOWING = 64 * 2**20


def progress_bar(what: str, size: int) -> Any:
    """Return a progress bar of ``size`` bytes with the `update` and `close` of tqdm."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return SimpleNamespace(update=lambda count: None, close=lambda: None)
    disable = None if size >= WORTH_SHOWING else True  # None: hidden without a terminal
    return tqdm(desc=what, total=size, unit="B", unit_scale=True, disable=disable)


class CountedFile(io.RawIOBase):
    """A binary file whose reads and writes update a progress bar.

    It has no file descriptor, so that `torch.load` cannot bypass it. `close` closes the bar, not
    the file.
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
