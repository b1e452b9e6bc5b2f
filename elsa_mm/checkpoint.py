"""Writes checkpoints completely or not at all, and finds and reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner import CheckpointLoader

from elsa_core.runtime.files import replacing
from elsa_core.weights import read_checkpoint
from elsa_core.weights.resume import first_whole, noted

# Prefix of paths that MMEngine itself writes to.
ATOMIC_PREFIX = "atomic://"


@register_backend("atomic_local", prefixes="atomic")
class AtomicLocalBackend(LocalBackend):
    """The local disk; a file appears under its name only when it is complete.

    A process that is killed while it writes leaves the previous content, and a ``.part`` file that
    the next attempt removes. Used with
    ``CheckpointHook(backend_args=dict(backend="atomic_local"))`` and for paths ``atomic://PATH``.
    Raises UsageError if a file cannot be written.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        filepath = str(filepath).removeprefix(ATOMIC_PREFIX)
        os.makedirs(os.path.dirname(filepath) or ".", exist_ok=True)
        with replacing(filepath) as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        self.put(obj.encode(encoding), filepath)


def find_last_checkpoint(folder: str | Path, passed: list[str] | None = None) -> Path | None:
    """The newest readable checkpoint of a work directory, or None.

    This is the one that MMEngine's ``last_checkpoint`` names, also after the folder was moved,
    otherwise the one with the highest number. Files that cannot be read are skipped.

    Args:
        passed: receives a sentence on each checkpoint that is skipped.
    """
    folder = Path(folder)
    numbers = ((_number(path), path) for path in folder.glob("*.pth"))
    numbered = sorted((number, path) for number, path in numbers if number is not None)
    candidates = [*_noted(folder), *(path for _, path in reversed(numbered))]
    return first_whole(candidates, [] if passed is None else passed, folders=True)


def _noted(folder: Path) -> list[Path]:
    """Where the checkpoint that ``last_checkpoint`` names may be."""
    name = noted(folder)
    places = [folder / Path(name).name, Path(name)] if name else []
    # DeepSpeed's checkpoints are folders with the same names.
    return [
        place
        for place in places
        if os.path.exists(place) and (_number(place) is not None or not place.is_dir())
    ]


def _number(path: Path) -> int | None:
    """The epoch or iteration in a checkpoint's name; None for other files."""
    match = re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", path.name)
    return int(match[1]) if match else None


def is_local(path: str) -> bool:
    """Whether MMEngine reads a checkpoint from the local disk and not from an address."""
    return "://" not in path or os.path.isfile(path)


def read_checked_files() -> None:
    """Makes MMEngine read local checkpoints with `elsa_core.weights` in this process.

    MMEngine's own reader executes code that a file contains.
    """
    CheckpointLoader.register_scheme("", load_from_local, force=True)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Reads a local checkpoint, with its tensors on the CPU.

    Raises UsageError if the file is missing, damaged or would execute code.
    """
    return read_checkpoint(os.path.expanduser(filename))


# Formats that MMEngine cannot read.
CheckpointLoader.register_scheme(
    [r"(?!.*://).*\.safetensors$", r"(?!.*://).*\.pkl$"], load_from_local, force=True
)
