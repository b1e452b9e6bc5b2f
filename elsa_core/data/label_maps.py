"""Label maps: pair them with images, read and check them."""

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
    """Return each image in a folder and its subfolders, in order, with its label map.

    The label map of SUB/X.JPG is SUB/X plus `map_ending`. Images have any of the known endings, in
    any case. Hidden files are ignored.

    Args:
        images: folder of images.
        maps: folder of label maps; None for images without label maps.
        stems: SUB/X of the images to use; None for all.

    Raises:
        UsageError: an image has no label map or a label map no image, two images have the same
            name, or an image in ``stems`` is missing.
    """
    found: dict[str, str] = {}
    for name in files_in(images, without=maps):
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
        n[: -len(map_ending)]: n for n in files_in(maps, without=images) if _is_map(n, map_ending)
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


def files_in(folder: str, without: str | None) -> Iterator[str]:
    """Yield the files in a folder and its subfolders, relative to it, in no order.

    Hidden files and the folder ``without`` are left out; links to a parent folder are not followed.
    """
    other = os.path.abspath(without) if without and without != folder else None
    above: dict[str, tuple[str, ...]] = {os.path.abspath(folder): (os.path.realpath(folder),)}
    for place, folders, files in os.walk(folder, followlinks=True):
        chain = above.pop(os.path.abspath(place))
        visible = [os.path.join(place, name) for name in folders if not name.startswith(".")]
        real = {path: os.path.realpath(path) for path in visible if os.path.abspath(path) != other}
        inside = {path: to for path, to in real.items() if to not in chain}
        above |= {os.path.abspath(path): (*chain, to) for path, to in inside.items()}
        folders[:] = map(os.path.basename, inside)
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)


def read_map(file: str | BinaryIO, name: str) -> np.ndarray:
    """Return the values in a label map [H, W] in their own type, or the indices into its palette.

    Raises UsageError, naming the file by `name`, if it cannot be read.
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
    """Return a label map [H, W], uint8: 0..num_classes - 1, or `ignore` for no class.

    Args:
        file: image of one channel, or with a palette, whose indices are the labels.
        name: name of the file in messages.
        num_classes: at most 255.
        reduce_zero_label: in the file, 0 and 255 mean no class, and classes begin at 1.
        ignore: label for no class; must be 255 with `reduce_zero_label`.
        size: height and width of the image; None to skip the check.

    Raises:
        UsageError: the file is not such an image, or has other labels or another size.
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
    """Return a sentence if all label maps hold only 0 and 255, and 255 occurs; else None.

    Masks are often saved this way, although 255 means no class. Stops at the first map with another
    value.
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
    """Decode a label map. Return its problem, or None.

    Args:
        allowed: values that it may have.
        image: image that must have the same size.
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
        return None  # the check of the image reports it
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
