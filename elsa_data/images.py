"""Whether an image or a label map can be read, to its last row."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# How a whole file begins and ends; what ends in another way is decoded to find out.
_WHOLE = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND\xaeB`\x82"))


def image_problem(path: str) -> str | None:
    """Decodes an image; what is wrong with it, or None."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a damaged file
        return reason(error, path)
    return None


def size_problem(path: str, width: Any, height: Any) -> str | None:
    """Decodes an image; what is wrong with it, or with the size that a file says it has."""
    try:
        with Image.open(path) as image:
            image.load()
            sizes = {image.size, ImageOps.exif_transpose(image).size}
    except Exception as error:
        return reason(error, path)
    if (width, height) in sizes:
        return None
    return "is {}x{} pixels, its annotations say {}x{}".format(*min(sizes), width, height)


def cut_off(path: str) -> str | None:
    """What `image_problem` says, but from the ends of the file alone where they suffice.

    OpenCV reads a JPEG that was cut off as an image whose rest is grey.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            file.seek(-min(8, file.seek(0, 2)), 2)
            tail = file.read()
    except OSError as error:
        return reason(error, path)
    if any(head.startswith(first) and tail.endswith(last) for first, last in _WHOLE):
        return None
    return image_problem(path)


def labels_problem(path: str, allowed: Collection[int], image: str | None = None) -> str | None:
    """Decodes a label map; what is wrong with it, or None.

    Args:
        allowed: the values that it may have.
        image: that it must be as large as.
    """
    try:
        with Image.open(path) as file:
            labels = np.array(file)
    except Exception as error:
        return reason(error, path)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        return f"must have one channel of whole numbers, has shape {labels.shape} {labels.dtype}"
    found = np.unique(labels)
    wrong = found[~np.isin(found, list(allowed))]
    if wrong.size:
        return f"has the value {wrong[0]}, allowed are {ranges(allowed)}"
    if image is None:
        return None
    try:
        with Image.open(image) as file:
            size = file.size
    except Exception:
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


def reason(error: Exception, path: str) -> str:
    """Why a file cannot be read, without its name, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.UnidentifiedImageError):
        return "is no image of a known kind, or empty"
    return " ".join(str(error).replace(repr(path), "").split()) or type(error).__name__
