"""Label maps: which image each belongs to, their values, and what is wrong with one."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from typing import BinaryIO

import numpy as np

from elsa_core.runtime.errors import UsageError

from .images import ENDINGS, open_image, read_image, reason

IGNORE = 255


def pair_files(
    images: str, maps: str | None, map_ending: str = ".png", stems: Collection[str] | None = None
) -> list[tuple[str, str | None]]:
    """Each image in a folder and its subfolders, in order, with its label map.

    The map of SUB/X.JPG in the one folder is SUB/X and `map_ending` in the other. Images have any
    of the known endings, which all may be in any case. Hidden files do not count.

    Args:
        images: a folder.
        maps: a folder; None for images without label maps.
        stems: SUB/X of the images that count, from a list of them; None: all.

    Raises UsageError for images without a label map and label maps without an image, for two images
    of one name, and for listed images that are not there.
    """
    found: dict[str, str] = {}
    for name in _files(images, without=maps):
        stem, ending = os.path.splitext(name)
        if ending.lower() not in ENDINGS or (images == maps and _is_map(name, map_ending)):
            continue
        if stems is not None and stem not in stems:
            continue
        if stem in found:
            raise UsageError(
                f"image folder {images} has two images of one name, {found[stem]} and {name}"
            )
        found[stem] = name
    if stems is not None and (missing := sorted(set(stems) - set(found))):
        what = f"{len(missing)} of the {len(set(stems))} listed images"
        raise UsageError(f"image folder {images} lacks {what}, the first is {missing[0]}")
    if maps is None:
        return [(os.path.join(images, name), None) for name in sorted(found.values())]
    labels = {
        n[: -len(map_ending)]: n for n in _files(maps, without=images) if _is_map(n, map_ending)
    }
    if missing := sorted(set(found) - set(labels)):
        raise UsageError(
            f"label map folder {maps} lacks {len(missing)} of {len(found)} label maps, "
            f"the first is {missing[0]}{map_ending}"
        )
    if stems is None and (surplus := sorted(set(labels) - set(found))):
        raise UsageError(
            f"image folder {images} lacks {len(surplus)} of the {len(labels)} images that have a "
            f"label map, the first is {surplus[0]} (endings: {', '.join(ENDINGS)})"
        )
    pairs = sorted((name, labels[stem]) for stem, name in found.items())
    return [(os.path.join(images, image), os.path.join(maps, map_)) for image, map_ in pairs]


def _is_map(name: str, ending: str) -> bool:
    return name.lower().endswith(ending.lower())


def _files(folder: str, without: str | None) -> Iterator[str]:
    """Relative to the folder, in it and in its subfolders but for another folder in it."""
    other = os.path.abspath(without) if without and without != folder else None
    above: dict[str, tuple[str, ...]] = {os.path.abspath(folder): (os.path.realpath(folder),)}
    for place, folders, files in os.walk(folder, followlinks=True):
        chain = above.pop(os.path.abspath(place))
        visible = [os.path.join(place, name) for name in folders if not name.startswith(".")]
        real = {path: os.path.realpath(path) for path in visible if os.path.abspath(path) != other}
        # No link to a folder above it.
        inside = {path: to for path, to in real.items() if to not in chain}
        above |= {os.path.abspath(path): (*chain, to) for path, to in inside.items()}
        folders[:] = map(os.path.basename, inside)
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)


def read_map(file: str | BinaryIO, name: str) -> np.ndarray:
    """The values in a label map [H, W], as wide as they are; with a palette, its indices.

    Raises UsageError, which names the file by `name`.
    """
    try:
        with open_image(file) as image:
            values = np.array(image)
    except Exception as error:  # as in `images`
        raise UsageError(f"label map {name} cannot be read: {reason(error, name)}") from error
    if values.ndim != 2 or not (values.dtype == bool or np.issubdtype(values.dtype, np.integer)):
        raise UsageError(
            f"a label map must have one channel of whole numbers, got {name} of shape "
            f"{values.shape} and type {values.dtype}"
        )
    return values.astype(np.uint8) if values.dtype == bool else values


def read_labels(
    file: str | BinaryIO,
    name: str,
    num_classes: int,
    reduce_zero_label: bool = False,
    ignore: int = IGNORE,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """A label map [H, W], uint8: 0..num_classes - 1, or `ignore` for no class.

    Args:
        file: an image of one channel; with a palette, its indices are the labels.
        name: of the file, for errors.
        num_classes: at most 255.
        reduce_zero_label: in the file, 0 and 255 stand for no class and the classes begin at 1.
        ignore: stands for no class; with `reduce_zero_label` it must be 255.
        size: height and width of the image; None: not checked.

    Raises UsageError, which names the file, for one that is no such image, for other labels, and
    for another size.
    """
    if num_classes > IGNORE:
        raise UsageError(f"label maps are for at most {IGNORE} classes, got {num_classes}")
    values = read_map(file, name)
    first = int(reduce_zero_label)
    low, high = first, num_classes + first - 1
    wrong = values[((values > high) | (values < 0)) & (values != ignore)]
    if wrong.size:
        raise UsageError(
            f"labels must be {low}..{high} for {num_classes} classes, or {'0 or ' * first}{ignore} "
            f"for none, got {wrong.max()} in {name}"
        )
    if size not in (None, values.shape):
        raise UsageError(
            f"a label map must be as large as its image, got {name} of {values.shape} pixels for "
            f"{size}"
        )
    if reduce_zero_label:
        values = np.where((values == 0) | (values == IGNORE), IGNORE, values.astype(np.int64) - 1)
    return values.astype(np.uint8)


def only_none(paths: Iterable[str], reduce_zero_label: bool) -> str | None:
    """A sentence where all label maps hold nothing but 0 and 255, and 255; else None.

    That is how masks are often saved, and 255 stands for no class. Reads up to the first map with
    another value.
    """
    found: set[int] = set()
    for path in paths:
        found.update(np.unique(read_map(path, path)).tolist())
        if not found <= {0, IGNORE}:
            return None
    if IGNORE not in found:
        return None
    right = "classes begin at 1" if reduce_zero_label else "write 1 for the second class"
    both = "0 and 255 stand" if reduce_zero_label else "255 stands"
    return f"hold only 0 and 255, but {both} for no class: {right}"


def labels_problem(path: str, allowed: Collection[int], image: str | None = None) -> str | None:
    """Decodes a label map; what is wrong with it, or None.

    Args:
        allowed: the values that it may have.
        image: that it must be as large as.
    """
    try:
        labels = read_map(path, path)
    except UsageError as error:
        return str(error).removeprefix(f"label map {path} cannot be read: ")
    found = np.unique(labels)
    wrong = found[~np.isin(found, list(allowed))]
    if wrong.size:
        return f"has the value {wrong[0]}, allowed are {ranges(allowed)}"
    if image is None:
        return None
    try:
        size = read_image(image).shape[1::-1]
    except UsageError:
        return None  # which the image's own check says
    if size != labels.shape[::-1]:
        return "is {}x{} pixels, its image {}x{}".format(*labels.shape[::-1], *size)
    return None


def ranges(values: Collection[int]) -> str:
    """{0, 1, 2, 255} -> "0..2, 255"."""
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and value == parts[-1][1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in parts)
