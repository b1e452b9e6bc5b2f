"""Rules for masks in COCO files: polygons, or compressed and uncompressed RLE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pycocotools.mask

from .problems import ERROR, FARTHEST, WARNING, Problem, are_numbers, shown
from .rle import compressed_counts

# Pixels along a polygon: pycocotools takes 100 bytes of memory for each, without a limit.
LONGEST_OUTLINE = 2**20


def polygon_parts(polygons: list) -> list:
    """Return the polygons that have 3 points or more."""
    return [part for part in polygons if len(part) >= 6 and len(part) % 2 == 0]


def rle_of(mask: list | dict, width: int, height: int) -> dict[str, Any]:
    """Return a mask without problems as compressed RLE."""
    if isinstance(mask, list):
        parts = pycocotools.mask.frPyObjects(polygon_parts(mask), height, width)
        return pycocotools.mask.merge(parts)
    if isinstance(mask["counts"], list):
        return pycocotools.mask.frPyObjects(mask, height, width)
    return mask


def mask_problems(
    one: dict, name: str, width: int, height: int, needed: bool, deep: bool = False
) -> Iterator[Problem]:
    """Yield the problems of an annotation's mask, `needed` or not; see `problems` for the rest."""
    mask = one.get("segmentation")
    if not mask:
        if needed:
            many = "{n} annotations have an empty mask, others have masks: usable for boxes only"
            rest = "must have a mask: polygons, or RLE with size and counts, as its segmentation"
            yield Problem(ERROR, "no-mask", many, name, f"{rest}, got {shown(mask)}")
        return
    if isinstance(mask, list):
        far = FARTHEST * max(width, height) or float("inf")
        plain = all(_is_plain(polygon, far) for polygon in mask)
        found = [] if plain else list(_polygon_problems(mask, name, width, height))
    elif isinstance(mask, dict):
        found = list(_rle_problems(mask, name, width, height))
    else:
        rest = "must have polygons or RLE with size and counts as its segmentation"
        many = "{n} masks are neither polygons nor RLE"
        found = [Problem(ERROR, "mask-form", many, name, rest)]
    yield from found
    if deep and width and all(problem.level != ERROR for problem in found):
        if not pycocotools.mask.area(rle_of(mask, width, height)):
            many = "{n} masks cover no pixel: left out of the evaluation of masks"
            yield Problem(WARNING, "mask-empty", many, name)


def _is_plain(polygon: Any, far: float) -> bool:
    """Whether a polygon has none of the problems that `_polygon_problems` reports."""
    if type(polygon) is not list or len(polygon) < 6 or len(polygon) % 2:
        return False
    if not set(map(type, polygon)) <= {int, float}:
        return False
    low, high = min(polygon), max(polygon)
    near = -far <= low and high <= far
    if not near or len(polygon) * (high - low) > LONGEST_OUTLINE:
        return False
    return sum(polygon) == sum(polygon)  # no NaN


def _polygon_problems(polygons: list, name: str, width: int, height: int) -> Iterator[Problem]:
    if not all(isinstance(polygon, list) and are_numbers(polygon) for polygon in polygons):
        many = "{n} masks have polygons that are no lists of finite numbers"
        rest = "must have polygons that are lists of finite numbers as its segmentation"
        yield Problem(ERROR, "polygon-form", many, name, rest)
        return
    good = polygon_parts(polygons)
    if not good:
        many = "{n} masks have no polygon of 3 points or more"
        rest = "must have a polygon of 3 points or more as its segmentation, got "
        yield Problem(ERROR, "no-polygon", many, name, rest + shown(polygons))
    elif len(good) < len(polygons):
        many = "{n} masks have polygons of fewer than 3 points: left out beside the others"
        yield Problem(WARNING, "polygon-short", many, name)
    far = FARTHEST * max(width, height) or float("inf")
    if any(max(polygon) > far or min(polygon) < -far for polygon in good):
        many = "{n} masks have polygons far outside their image"
        rest = f"must have polygons in its image of {width}x{height} pixels"
        yield Problem(ERROR, "polygon-off-image", many, name, rest)
    elif any(_outline(polygon) > LONGEST_OUTLINE for polygon in good):
        many = f"{{n}} masks have polygons of more than {LONGEST_OUTLINE:,} pixels in length"
        rest = f"must have polygons of at most {LONGEST_OUTLINE:,} pixels in length"
        yield Problem(ERROR, "polygon-length", many, name, rest)


def _outline(polygon: list[float]) -> float:
    """Return the number of pixels along the edges as pycocotools counts them, or a low bound."""
    bound = len(polygon) * (max(polygon) - min(polygon))
    if bound <= LONGEST_OUTLINE:
        return bound
    corners = np.asarray(polygon, dtype=float).reshape(-1, 2)
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum())


def _rle_problems(rle: dict, name: str, width: int, height: int) -> Iterator[Problem]:
    counts, size = rle.get("counts"), rle.get("size")
    if isinstance(counts, str):
        counts = compressed_counts(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        many = "{n} masks are broken RLE: no size and counts of 0 or more"
        rest = "must have polygons or RLE with size and counts as its segmentation"
        yield Problem(ERROR, "rle-form", many, name, rest)
    elif (
        not isinstance(size, list)
        or not all(type(side) is int for side in size)
        or (width and size != [height, width])
    ):
        many = "{n} masks in RLE are not as large as their image"
        rest = f"must have RLE of the image's size [{height}, {width}], got {shown(size)}"
        yield Problem(ERROR, "rle-size", many, name, rest)
    elif width and sum(counts) != width * height:
        # pycocotools would fill the rest with uninitialised memory.
        many = "{n} masks are broken RLE: counts do not add up to the size"
        rest = f"must have RLE whose counts add up to {width * height}, got {sum(counts)}"
        yield Problem(ERROR, "rle-broken", many, name, rest)
