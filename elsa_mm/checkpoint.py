"""Checkpoints that are written whole or not at all, and found again for a resumed training."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner import CheckpointLoader

from elsa_core.files import replacing
from elsa_weights import check_checkpoint, read_checkpoint, safetensors


@register_backend("atomic_local")
class AtomicLocalBackend(LocalBackend):
    """The local disk, where a file gets its name only when it is complete.

    MMEngine's own writes in place. Here, a process that is killed while it writes leaves the
    file's previous content, and beside it a ``.part`` file that the next attempt overwrites. Used
    with ``CheckpointHook(backend_args=dict(backend="atomic_local"))``. Raises UsageError where a
    file cannot be written.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        os.makedirs(os.path.dirname(filepath) or ".", exist_ok=True)
        with replacing(filepath) as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        self.put(obj.encode(encoding), filepath)


def find_last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a work directory, None if there is none.

    That is the one that MMEngine's ``last_checkpoint`` names, also after the folder was moved, or
    without it the one with the highest number; damaged ones are passed over.
    """
    folder = Path(folder)
    candidates = []
    note = folder / "last_checkpoint"
    if note.is_file() and (name := note.read_text().strip()):
        named = Path(name)
        candidates += [folder / named.name, named]
    numbered = [path for path in folder.glob("*.pth") if _number(path) is not None]
    candidates += sorted(numbered, key=_number, reverse=True)
    for path in candidates:
        if path.is_file() and is_whole_checkpoint(path):
            return path
        if path.is_dir() and any(path.iterdir()):  # DeepSpeed's
            return path
    return None


def _number(path: Path) -> int | None:
    """Of the epoch or iteration in a checkpoint's name; None for other files."""
    match = re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", path.name)
    return int(match[1]) if match else None


def is_whole_checkpoint(path: str | Path) -> bool:
    """Whether a file is a complete archive of torch.save, a pickle from before PyTorch 1.6, or
    begins as a safetensors file does."""
    if zipfile.is_zipfile(path):
        return True
    with open(path, "rb") as file:
        head = file.read(9)
    return head[:1] == b"\x80" or safetensors.is_safetensors(head, os.path.getsize(path))


def local_content(path: str | Path) -> Any:
    """What is in a checkpoint that `preflight.check_checkpoint` lets pass.

    Where the format allows it, the tensors' bytes stay on the disk.
    """
    if zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return read_checkpoint(path)


def read_checked_files() -> None:
    """Lets MMEngine read local checkpoints in this process after a look at what they would execute.

    Its own versions call `torch.load` in different ways: 0.10.7 cannot read what it has saved, with
    PyTorch 2.6 or newer, and others execute whatever a file asks for.
    """
    CheckpointLoader.register_scheme(r"(?!.*://)", load_checked, force=True)


def load_checked(filename: str, map_location: Any = None) -> Any:
    """The content of a local checkpoint of PyTorch.

    Raises FileNotFoundError, and UsageError for a file that is damaged or would execute code.
    """
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f"{filename} can not be found.")
    check_checkpoint(filename)
    return torch.load(filename, map_location=map_location, weights_only=False)


@CheckpointLoader.register_scheme(r".*\.safetensors$", force=True)
def load_from_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """What MMEngine loads where a checkpoint's name ends in .safetensors, on the CPU.

    Raises FileNotFoundError, and UsageError for a damaged file.
    """
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f"{filename} can not be found.")
    tensors, meta = safetensors.load(filename)
    return {"state_dict": tensors, "meta": meta}


@CheckpointLoader.register_scheme(r"(?!.*://).*\.pkl$", force=True)
def load_from_pickle(filename: str, map_location: Any = None) -> Any:
    """What MMEngine loads where a local checkpoint's name ends in .pkl, as Detectron2's zoo has
    them, on the CPU.

    Raises UsageError for a file that is not there, damaged, or would execute code.
    """
    return read_checkpoint(os.path.expanduser(filename))
