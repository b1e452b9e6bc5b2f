"""Find the checkpoint to resume from, by the same rules in both frameworks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from elsa_core.runtime.errors import UsageError

from .read import read_ahead

LONGEST_PATH = 4096  # bytes, Linux's limit; longer content of last_checkpoint is not a path


def noted(folder: str | Path) -> str:
    """Return the path in the file ``last_checkpoint`` of a folder, or "".

    Reads no more of the file than the longest path.
    """
    note = Path(folder, "last_checkpoint")
    try:
        if not note.is_file():
            return ""
        with note.open("rb") as file:
            content = file.read(LONGEST_PATH + 1)
        path = content.decode().strip()
    except (OSError, ValueError):
        return ""
    return "" if len(content) > LONGEST_PATH or "\0" in path else path


def first_whole(
    candidates: Iterable[Path], passed: list[str], *, folders: bool = False
) -> Path | None:
    """Return the first checkpoint that can be read, or None. `read_ahead` keeps its content.

    Args:
        candidates: checkpoints, best first; consumed only up to the first readable one.
        passed: receives a sentence for each checkpoint that is passed over.
        folders: accept a folder that is not empty, such as a DeepSpeed checkpoint.
    """
    tried: set[Path] = set()
    for path in candidates:
        if path in tried:
            continue
        tried.add(path)
        if folders and path.is_dir():
            if any(path.iterdir()):
                return path
            continue
        try:
            read_ahead(path)
            return path
        except UsageError as error:
            if str(error) not in passed:
                passed.append(str(error))
    return None


def notes_on(passed: Sequence[str]) -> list[str]:
    """Return log messages for a training that resumes from another checkpoint than these."""
    return [f"passed over: {sentence}" for sentence in passed]


def refuse_if_none_is_whole(folder: str, passed: Sequence[str]) -> None:
    """Raise UsageError if a folder has checkpoints but none can be read.

    A training that started from the beginning would overwrite them.
    """
    if passed:
        others = f" (and {len(passed) - 1} more)" if len(passed) > 1 else ""
        raise UsageError(
            f"no checkpoint in {folder} can be resumed from: {passed[0]}{others}; to start over, "
            "train in another folder"
        )
