"""Checkpoints that are written whole or not at all, and found again for a resumed training."""

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

# For paths that MMEngine writes to by itself.
ATOMIC_PREFIX = "atomic://"


@register_backend("atomic_local", prefixes="atomic")
class AtomicLocalBackend(LocalBackend):
    """The local disk, where a file gets its name only when it is complete.

    MMEngine's own writes in place. Here, a process that is killed while it writes leaves the
    file's previous content, and beside it a ``.part`` file that the next attempt removes. Used
    with ``CheckpointHook(backend_args=dict(backend="atomic_local"))``, and to write to
    ``atomic://PATH``. Raises UsageError where a file cannot be written.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        filepath = str(filepath).removeprefix(ATOMIC_PREFIX)
        os.makedirs(os.path.dirname(filepath) or ".", exist_ok=True)
        with replacing(filepath) as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        self.put(obj.encode(encoding), filepath)


def find_last_checkpoint(folder: str | Path, passed: list[str] | None = None) -> Path | None:
    """The newest whole checkpoint of a work directory, None if there is none.

    That is the one that MMEngine's ``last_checkpoint`` names, also after the folder was moved, or
    without it the one with the highest number; what cannot be read is passed over.

    Args:
        passed: gets a sentence on each checkpoint that is passed over.
    """
    folder = Path(folder)
    numbered = [path for path in folder.glob("*.pth") if _number(path) is not None]
    candidates = [*_noted(folder), *sorted(numbered, key=_number, reverse=True)]
    return first_whole(candidates, [] if passed is None else passed, folders=True)


def _noted(folder: Path) -> list[Path]:
    """The places of the checkpoint that ``last_checkpoint`` names."""
    name = noted(folder)
    places = [folder / Path(name).name, Path(name)] if name else []
    # DeepSpeed's are folders, with the same names.
    return [
        place
        for place in places
        if os.path.exists(place) and (_number(place) is not None or not place.is_dir())
    ]


def _number(path: Path) -> int | None:
    """Of the epoch or iteration in a checkpoint's name; None for other files."""
    match = re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", path.name)
    return int(match[1]) if match else None


def is_local(path: str) -> bool:
    """Whether MMEngine reads a checkpoint from this machine's disks, not from an address."""
    return "://" not in path or os.path.isfile(path)


def read_checked_files() -> None:
    """Lets `elsa_core.weights` read every local checkpoint that MMEngine loads in this process.

    MMEngine itself executes whatever a file asks for.
    """
    CheckpointLoader.register_scheme("", load_from_local, force=True)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """The content of a local checkpoint, with its tensors on the CPU.

    Raises UsageError for a file that is not there, is damaged or would execute code.
    """
    return read_checkpoint(os.path.expanduser(filename))


# Formats that MMEngine cannot read, in every process.
CheckpointLoader.register_scheme(
    [r"(?!.*://).*\.safetensors$", r"(?!.*://).*\.pkl$"], load_from_local, force=True
)
