"""The files of a source folder, and what its readers make of them."""

from __future__ import annotations

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from elsa_core.data.coco_rules import is_crowd
from elsa_core.data.images import ENDINGS
from elsa_core.data.label_maps import files_in
from elsa_core.runtime.errors import UsageError

TRAIN, VAL, TEST = "train", "val", "test"
RUN = "fit.json"  # lies in the folder of a run of `elsa fit`
# Names of folders, in lower case.
IMAGES = ("images", "image", "imgs", "img", "img_dir", "jpegimages")
_ROLES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation"), VAL),
    **dict.fromkeys(("test", "testing"), TEST),
}


@dataclass
class Sample:
    """An image of the source and what is annotated on it.

    Args:
        path: image file.
        role: "train", "val" or "test"; None if the source has no parts.
        annotations: objects as in COCO's format, with the name of the class as "category" instead
            of ids.
        size: width and height that the annotations give, if they do.
        map: label map.
        source: file that holds the annotations, for messages.
    """

    path: Path
    role: str | None = None
    annotations: list[dict[str, Any]] = field(default_factory=list)
    size: tuple[int, int] | None = None
    map: Path | None = None
    source: str = ""

    @property
    def classes(self) -> frozenset[str]:
        """Names of the classes that an object of the image has."""
        return frozenset(one["category"] for one in self.annotations if not is_crowd(one))


@dataclass
class Source:
    """Content of a source folder.

    Args:
        layout: one sentence about what was recognised.
        classes: names of the classes in order.
        warnings: as in `DataSet`.
        reduce_zero_label: as in `DataSet`.
    """

    layout: str
    classes: list[str]
    samples: list[Sample]
    warnings: list[str] = field(default_factory=list)
    reduce_zero_label: bool = False


class Tree:
    """The files in a folder and its subfolders, listed once.

    Hidden files are ignored, and so are folders that a run of ``elsa fit`` has written.

    Args:
        root: folder.
        out: folder that is not part of the source, even if it lies in ``root``.
    """

    def __init__(self, root: Path, out: Path | None = None) -> None:
        if not root.is_dir():
            raise UsageError(f"{root} is not a folder" if root.exists() else f"{root} is not there")
        self.root = root
        without = None if out is None else str(out)
        found = sorted(path.replace(os.sep, "/") for path in files_in(str(root), without))
        runs = {posixpath.dirname(name) for name in found if posixpath.basename(name) == RUN}
        found = [name for name in found if not runs & set(map(str, PurePosixPath(name).parents))]
        self.files = dict.fromkeys(found)  # in order, and found at once
        self.images = [name for name in self.files if PurePosixPath(name).suffix.lower() in ENDINGS]
        self.folders = {str(one) for name in found for one in PurePosixPath(name).parents}
        self._inside = defaultdict(list)
        for folder in sorted(self.folders - {"."}):
            above, _, name = folder.rpartition("/")
            self._inside[above].append(name)

    def ending(self, *endings: str) -> list[str]:
        """Return the files with one of the endings, in lower case, outermost first."""
        found = [name for name in self.files if name.lower().endswith(endings)]
        return sorted(found, key=lambda name: (name.count("/"), name))

    def beside(self, folder: str, names: Collection[str]) -> list[str]:
        """Return the folders that are to another one as "masks/a" is to "images/a".

        Args:
            folder: relative folder; with "/." at its end, also for folders inside of it.
            names: names in lower case, of which one stands for any part of ``folder``.
        """
        parts = folder.split("/") if folder else []
        return [
            "/".join([*parts[:place], other, *(one for one in parts[place + 1 :] if one != ".")])
            for place, part in enumerate(parts)
            for other in self._inside["/".join(parts[:place])]
            if other.lower() in names and other != part
        ]

    def path(self, name: str) -> Path:
        return self.root / name

    def spare(self, used: Collection[str]) -> list[str]:
        """Return the images that are not used and lie beside images that are."""
        folders = {posixpath.dirname(name) for name in used}
        found = [name for name in self.images if posixpath.dirname(name) in folders]
        return [name for name in found if name not in used]

    def by_stem(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return {name without its ending: names}."""
        found = defaultdict(list)
        for name in names:
            found[stem_of(name)].append(name)
        return dict(found)


def has_mask(one: dict[str, Any]) -> bool:
    """Whether an annotation has a mask, or a polygon in fractions of the image (YOLO)."""
    return bool(one.get("segmentation")) or len(one.get("fractions", ())) > 4


def stem_of(name: str) -> str:
    """Return a relative path without the ending of its file."""
    return os.path.splitext(name)[0]


def role_of(name: str) -> str | None:
    """Return the part that a relative path names, "train", "val" or "test", or None.

    The last word counts: "annotations/instances_train2017.json" is of "train".
    """
    words = [_ROLES[word] for word in re.findall("[a-z]+", name.lower()) if word in _ROLES]
    return words[-1] if words else None


def few(names: Iterable[str], limit: int = 3) -> str:
    """Return the first names as a list in a sentence."""
    found = list(names)
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more


def read_text(path: Path) -> str:
    """Return a text file in UTF-8, with or without a byte order mark.

    Raises:
        UsageError: the file cannot be read; the message names it.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8: {error.reason}") from error
