"""Find configs in an installed package or in the clone that it is imported from."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from .errors import UsageError


def find_config(name: str, installed: Path, repository: Path) -> str:
    """Return the path of a config.

    Args:
        name: path relative to the config folder, such as "folder/name.py".
        installed: config folder of an installed package; takes precedence.
        repository: config folder of a clone.

    Raises:
        UsageError: the config does not exist; the message suggests similar names.
    """
    folder = installed if installed.is_dir() else repository
    path = folder / name
    if path.is_file():
        return str(path)
    known = [p.relative_to(folder).as_posix() for p in folder.rglob(f"*{path.suffix or '.*'}")]
    like = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f", did you mean {' or '.join(like)}" if like else ""
    raise UsageError(f"there is no config {name} in {folder}{hint}")
