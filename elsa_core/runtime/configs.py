"""Finds the configs: inside an installed package, or in the repository that it is imported from."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from .errors import UsageError


def find_config(name: str, installed: Path, repository: Path) -> str:
    """The path of a config that is named by its place in the folder of configs.

    Args:
        name: such as "folder/name.py".
        installed: the folder in an installed package; it goes first.
        repository: the folder in a clone.

    Raises UsageError for one that is not there, with names that are like it.
    """
    folder = installed if installed.is_dir() else repository
    path = folder / name
    if path.is_file():
        return str(path)
    known = [p.relative_to(folder).as_posix() for p in folder.rglob(f"*{path.suffix or '.*'}")]
    like = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f", did you mean {' or '.join(like)}" if like else ""
    raise UsageError(f"there is no config {name} in {folder}{hint}")
