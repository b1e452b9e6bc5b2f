"""Checkpoints that are written whole or not at all, and found again for a resumed training."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend


@register_backend("atomic_local")
class AtomicLocalBackend(LocalBackend):
    """The local disk, where a file gets its name only when it is complete.

    MMEngine's own writes in place. Here, a process that is killed while it writes leaves the
    file's previous content, and beside it a ``.part`` file that the next attempt overwrites. Used
    with ``CheckpointHook(backend_args=dict(backend="atomic_local"))``.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        part = f"{filepath}.part"
        super().put(obj, part)
        os.replace(part, filepath)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        self.put(obj.encode(encoding), filepath)


def find_last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a work directory, None if there is none.

    That is the one that MMEngine's ``last_checkpoint`` names, also after the folder was moved, or
    without it the one with the highest number; damaged ones are passed over.
    """
    folder = Path(folder)
    candidates = []
    if (note := folder / "last_checkpoint").is_file():
        named = Path(note.read_text().strip())
        candidates += [folder / named.name, named]
    numbered = [path for path in folder.glob("*.pth") if _number(path) is not None]
    candidates += sorted(numbered, key=_number, reverse=True)
    for path in candidates:
        if path.is_file() and is_whole_checkpoint(path):
            return path
    return None


def _number(path: Path) -> int | None:
    """Of the epoch or iteration in a checkpoint's name; None for other files."""
    match = re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", path.name)
    return int(match[1]) if match else None


def is_whole_checkpoint(path: str | Path) -> bool:
    """Whether a file is a complete archive of torch.save, or a pickle from before PyTorch 1.6."""
    if zipfile.is_zipfile(path):
        return True
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"
