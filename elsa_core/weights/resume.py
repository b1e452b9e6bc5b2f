"""The checkpoint that a training goes on from, found by the same rules in both frameworks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from elsa_core.runtime.errors import UsageError

from .read import read_ahead

LONGEST_PATH = 4096  # bytes, Linux's limit; what else is in last_checkpoint is no path


def noted(folder: str | Path) -> str:
    """The path in the file ``last_checkpoint`` of a folder; "" where there is none.

    A longer file than a path can be is not read to its end.
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
    """The first of some checkpoints that can be read, None without one. `read_ahead` keeps it.

    Args:
        candidates: the best first; each is asked for once those before it cannot be read.
        passed: gets a sentence on each that is passed over.
        folders: whether a folder is a checkpoint, as DeepSpeed's are, unless it is empty.
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
    """For the log of a training that goes on from another checkpoint than these."""
    return [f"passed over: {sentence}" for sentence in passed]


def refuse_if_none_is_whole(folder: str, passed: Sequence[str]) -> None:
    """Raises UsageError where a folder has checkpoints, and none of them can be read.

    A training that then started from the beginning would write over them.
    """
    if passed:
        others = f" (and {len(passed) - 1} more)" if len(passed) > 1 else ""
        raise UsageError(
            f"no checkpoint in {folder} can be resumed from: {passed[0]}{others}; to begin anew, "
            "train in another folder"
        )
