"""Finds the places where the frameworks look for a data set, and links it there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elsa_core.runtime.errors import UsageError

from .layout import DETECTRON2, FRAMEWORKS, OPENMMLAB, Layout

MADE, THERE, IN_THE_WAY = "made", "there already", "in the way"


@dataclass(frozen=True)
class Place:
    """A folder and the frameworks that look for the data set in it."""

    folder: str
    frameworks: tuple[str, ...]


def roots(root: str | None = None) -> dict[str, str]:
    """Returns {framework: folder in which it looks for data sets}.

    Args:
        root: one folder for both frameworks instead of their own.
    """
    if root is not None:
        return dict.fromkeys(FRAMEWORKS, root)
    detectron2 = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS") or "datasets")
    return {DETECTRON2: detectron2, OPENMMLAB: "data"}


def places(
    layout: Layout, root: str | None = None, frameworks: Sequence[str] = FRAMEWORKS
) -> list[Place]:
    """Returns the places where the frameworks look, each path once."""
    found = [
        Place(os.path.join(base, layout.places[framework]), (framework,))
        for framework, base in roots(root).items()
        if framework in frameworks and framework in layout.places
    ]
    return distinct(found, os.path.abspath)


def distinct(found: Sequence[Place], path: Callable[[str], str] = os.path.realpath) -> list[Place]:
    """Merges the places whose folders have the same ``path``."""
    known: dict[str, Place] = {}
    for place in found:
        before = known.get(path(place.folder), Place(place.folder, ()))
        both = Place(before.folder, before.frameworks + place.frameworks)
        known[path(place.folder)] = both
    return list(known.values())


@dataclass(frozen=True)
class Link:
    """A link and its status: "made", "there already" or "in the way"."""

    path: str
    target: str
    status: str
    what: str = ""

    def __str__(self) -> str:
        if self.status == IN_THE_WAY:
            return f"{self.path} is {self.what}, which stays as it is: no link to {self.target}"
        return f"{self.path} -> {self.target} ({self.status})"


def link(
    layout: Layout,
    source: str,
    root: str | None = None,
    frameworks: Sequence[str] = FRAMEWORKS,
    *,
    dry_run: bool = False,
) -> list[Link]:
    """Makes symbolic links to a data set where the frameworks look for it.

    Makes all links, or none if something else is in the way of one. Never changes existing files.

    Args:
        source: the data set's folder.
        dry_run: only report what would be done.

    Raises UsageError if `source` has none of the data set's folders, for a link inside of it, and
    where a link cannot be made.
    """
    source = os.path.abspath(os.path.expanduser(source))
    _check_source(layout, source)
    wanted = [place.folder for place in places(layout, root, frameworks)]
    for path in wanted:
        folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
        if f"{folder}/".startswith(f"{os.path.realpath(source)}/"):
            raise UsageError(
                f"{path} would be a link inside the data set to itself: give another --root"
            )
    links = [_plan(path, source) for path in wanted]
    if dry_run or any(one.status == IN_THE_WAY for one in links):
        return links
    for one in links:
        if one.status == MADE:
            try:
                os.makedirs(os.path.dirname(one.path) or ".", exist_ok=True)
                os.symlink(source, one.path, target_is_directory=True)
            except OSError as error:
                raise UsageError(f"{one.path} cannot be made: {error.strerror}") from error
    return links


def _check_source(layout: Layout, source: str) -> None:
    if not os.path.isdir(source):
        raise UsageError(f"--from {source} is not a folder")
    expected = dict.fromkeys(part.folder.split("/")[0] for part in layout.parts)

    def has_some(folder: str) -> bool:
        return any(os.path.isdir(os.path.join(folder, name)) for name in expected)

    if not has_some(source):
        inner = [os.path.join(source, name) for name in layout.places.values()]
        hint = next((f"; is it {folder}?" for folder in inner if has_some(folder)), "")
        raise UsageError(
            f"--from {source} must be the folder of {layout.title}, but has none of "
            f"{', '.join(expected)}{hint}"
        )


def _plan(path: str, source: str) -> Link:
    if not os.path.lexists(path):
        return Link(path, source, MADE)
    if os.path.exists(path) and os.path.samefile(path, source):
        return Link(path, source, THERE)
    if os.path.islink(path):
        gone = "" if os.path.exists(path) else ", which does not exist"
        what = f"a link to {os.readlink(path)}{gone}"
    else:
        what = "a folder" if os.path.isdir(path) else "a file"
    return Link(path, source, IN_THE_WAY, what)
