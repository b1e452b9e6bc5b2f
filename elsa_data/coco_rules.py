"""What a file in COCO's format must hold: the one list of rules, for the checker and for runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask

from .report import ERROR, WARNING
from .rle import compressed_counts

TOLERANCE = 1.0
# pycocotools counts the pixels of a mask in 32 bits.
MOST_PIXELS = 2**32
# Where COCO's widest range of areas ends: pycocotools leaves out what is larger.
LARGEST_AREA = 1e10


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, once.

    Args:
        level: "error": training or evaluation would fail or be wrong; "warning": repaired in
            memory or left out, in both frameworks alike.
        rule: its name for programs.
        many: the sentence about all of the kind, with {n} for their number.
        name: of the entry.
        one: the rest of a sentence that begins with the entry's name; "" where `many` does.
        value: what the entry has, after its name in the examples for `many`.
    """

    level: str
    rule: str
    many: str
    name: str
    one: str = ""
    value: str = ""

    @property
    def example(self) -> str:
        return self.name + self.value

    def __str__(self) -> str:
        return f"{self.name} {self.one}" if self.one else self.many


def problems(
    coco: dict[str, Any],
    masks: bool | None = None,
    *,
    annotations: list[dict] | None = None,
    tolerance: float = TOLERANCE,
    deep: bool = False,
) -> Iterator[Problem]:
    """All problems of a file's content, in the order of the file.

    Args:
        coco: with lists of objects as images and categories; that of annotations may be missing,
            as in test sets. Entries of COCO's panoptic format are left alone.
        masks: whether masks are needed (True), not looked at (False), or needed once one
            annotation has one (None).
        annotations: those of `coco`, as an iterable that shows progress.
        tolerance: pixels that a box may reach over the edge of its image.
        deep: also draws each mask to see whether it covers a pixel.
    """
    sizes = {}
    yield from _images(coco["images"], sizes)
    entries = coco.get("annotations")
    yield from _categories(coco["categories"], entries)
    if entries is None or any("segments_info" in one for one in entries):
        return
    known = {_key(category.get("id")) for category in coco["categories"]}
    yield from _ids(entries, "annotation")
    given = any(one.get("segmentation") for one in entries)
    needed, objects = given if masks is None else masks, 0
    for one in entries if annotations is None else annotations:
        name = f"annotation {one.get('id')}"
        if (image := _key(one.get("image_id"))) not in sizes:
            many = "{n} annotations belong to images that are not in the file"
            rest = f"belongs to image {one.get('image_id')}, which is not in the file"
            value = f" of image {one.get('image_id')}"
            yield Problem(ERROR, "unknown-image", many, name, rest, value)
            continue
        if _key(one.get("category_id")) not in known:
            many = "{n} annotations have a category that is not in the file"
            rest = f"has category {one.get('category_id')}, which is not in the file"
            value = f" of category {one.get('category_id')}"
            yield Problem(ERROR, "unknown-category", many, name, rest, value)
        yield from _flags(one, name)
        yield from _box(one, name, *sizes[image], tolerance)
        objects += not is_crowd(one) and is_box(one.get("bbox")) and has_area(one["bbox"])
        if masks is not False:
            yield from mask_problems(one, name, *sizes[image], needed, deep)
    if not objects:
        text = "no annotation is an object: a box with an area that is no crowd"
        yield Problem(ERROR, "no-objects", text, f"{len(entries)} annotations")
    elif not given and masks is None:
        yield Problem(WARNING, "no-masks", "no annotation has a mask: fit for boxes only", "")


def is_crowd(one: dict[str, Any]) -> bool:
    """Whether an annotation is neither learnt nor counted: a crowd, or what VOC calls difficult."""
    return bool(one.get("iscrowd") or one.get("ignore"))


def is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and are_numbers(box)


def has_area(box: list[float]) -> bool:
    """Whether a box [x, y, width, height] keeps its size, to 1 %, in float32.

    Both frameworks predict edges in float32: what is thinner than that can never be found.
    """
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return False
    if min(width, height) > 1e-4 * max(abs(x) + width, abs(y) + height):
        return True
    left, right, top, bottom = map(float, np.float32([x, x + width, y, y + height]))
    return abs(right - left - width) <= 0.01 * width and abs(bottom - top - height) <= 0.01 * height


def polygon_parts(polygons: list) -> list:
    """Those of an annotation's polygons that have 3 points or more."""
    return [part for part in polygons if len(part) >= 6 and len(part) % 2 == 0]


def rle_of(mask: list | dict, width: int, height: int) -> dict[str, Any]:
    """The compressed run lengths of a mask without problems: polygons, or RLE of both forms."""
    if isinstance(mask, list):
        parts = pycocotools.mask.frPyObjects(polygon_parts(mask), height, width)
        return pycocotools.mask.merge(parts)
    if isinstance(mask["counts"], list):
        return pycocotools.mask.frPyObjects(mask, height, width)
    return mask


def are_numbers(values: list) -> bool:
    """Whether all are numbers, finite and of a size that float32 holds."""
    if not set(map(type, values)) <= {int, float}:
        return False
    return not values or (-1e30 < min(values) and max(values) < 1e30 and sum(values) == sum(values))


def _key(value: Any) -> Any:
    """An id that can be looked up; True and 1.0 are none, though Python finds 1 by them."""
    return value if type(value) in (int, str) else float("nan")


def _ids(entries: list[dict], what: str) -> Iterator[Problem]:
    seen: set[Any] = set()
    for entry in entries:
        found = entry.get("id")
        name = f"{what} {entry.get('file_name') or found}" if what == "image" else f"{what} {found}"
        if type(found) not in (int, str):
            many = f"{{n}} {what} entries have no id, a whole number or text"
            yield Problem(ERROR, f"no-{what}-id", many, name, f"has no id, got {found!r}")
        elif found in seen:
            many = f"{{n}} {what} ids are there more than once"
            rest = f"has the id {found!r}, which is there twice"
            yield Problem(ERROR, f"duplicate-{what}-id", many, name, rest, f" (id {found!r})")
        else:
            seen.add(found)
    if len({type(found) for found in seen}) > 1:
        text = next(found for found in seen if isinstance(found, str))
        many = f"{what} ids are numbers and texts: 1 and '1' may or may not be the same"
        yield Problem(ERROR, f"mixed-{what}-ids", many, f"{what} {text!r}")
    elif what == "annotation":
        for found in seen:
            if isinstance(found, str) or found < 1:
                many = "{n} annotation ids are 0 or less, or text: numbered from 1 in memory"
                yield Problem(WARNING, "annotation-id-form", many, f"annotation {found}")


def _images(entries: list[dict], sizes: dict[Any, tuple[int, int]]) -> Iterator[Problem]:
    """Fills in width and height by id; (0, 0) where they are no sizes."""
    yield from _ids(entries, "image")
    if not entries:
        yield Problem(ERROR, "no-images", "has no images", "images: []")
    names: set[Any] = set()
    for entry in entries:
        name, file = f"image {entry.get('file_name') or entry.get('id')}", entry.get("file_name")
        sides = entry.get("width"), entry.get("height")
        wrong = next((k for k in ("width", "height") if type(entry.get(k)) is not int), None)
        if wrong is not None or min(sides) <= 0 or sides[0] * sides[1] >= MOST_PIXELS:
            many = "{n} images have no width and height above 0, whole numbers"
            rest = f"must have a width and height above 0 and under 2^32 pixels, got {sides}"
            if wrong is not None:
                rest = f"has no {wrong}, got {entry.get(wrong)!r}"
            yield Problem(ERROR, "image-size", many, name, rest)
            sides = 0, 0
        if not isinstance(file, str) or not file:
            rest = f"has no file_name, got {file!r}"
            yield Problem(
                ERROR,
                "no-file-name",
                "{n} images have no file_name",
                f"image {entry.get('id')}",
                rest,
            )
        elif file in names:
            yield Problem(WARNING, "duplicate-file-name", "{n} files are named twice", file)
        else:
            names.add(file)
        sizes[_key(entry.get("id"))] = sides


def _categories(entries: list[dict], annotations: list[dict] | None) -> Iterator[Problem]:
    yield from _ids(entries, "category")
    if not entries:
        yield Problem(ERROR, "no-categories", "has no categories", "categories: []")
    used = {_key(one.get("category_id")) for one in annotations or []}
    names: set[str] = set()
    for entry in entries:
        name, label = f"category {entry.get('id')}", entry.get("name")
        if not isinstance(label, str) or not label:
            rest = f"has no name, got {label!r}"
            yield Problem(ERROR, "no-category-name", "{n} categories have no name", name, rest)
        elif label in names:
            rest = f"has the name {label!r}, which is there twice"
            many = "{n} category names are there more than once"
            yield Problem(ERROR, "duplicate-category-name", many, name, rest, f" {label}")
        else:
            names.add(label)
        if annotations and _key(entry.get("id")) not in used:
            many = "{n} categories have no annotation"
            yield Problem(WARNING, "unused-category", many, str(label))


def _flags(one: dict, name: str) -> Iterator[Problem]:
    for key in ("iscrowd", "ignore"):
        value = one.get(key)
        if value is None or (isinstance(value, (bool, int, float)) and value in (0, 1)):
            continue
        many = f"{{n}} annotations have an {key} that is neither 0 nor 1"
        rest = f"must have an {key} of 0 or 1, got {value!r}"
        yield Problem(ERROR, f"{key}-form", many, name, rest, f": {value!r}")
    if one.get("iscrowd") is None:
        many = "{n} annotations have no iscrowd: read as 0"
        yield Problem(WARNING, "no-iscrowd", many, name)
    if one.get("ignore"):
        many = "{n} annotations have ignore 1: neither learnt nor counted, as crowds"
        yield Problem(WARNING, "ignored", many, name)


def _box(one: dict, name: str, width: int, height: int, tolerance: float) -> Iterator[Problem]:
    box, area = one.get("bbox"), one.get("area")
    if not is_box(box):
        many = "{n} annotations have no bbox of 4 finite numbers [x, y, width, height]"
        rest = f"must have a bbox of 4 numbers, got {box}"
        yield Problem(ERROR, "box-form", many, name, rest, f": {box}")
        return
    if area is not None and not (are_numbers([area]) and area <= LARGEST_AREA):
        many = f"{{n}} annotations have an area that is no number up to {LARGEST_AREA:.0e}"
        rest = f"must have an area, a number up to {LARGEST_AREA:.0e}, got {area!r}"
        yield Problem(ERROR, "area-form", many, name, rest, f": {area!r}")
    elif area is None or area <= 0:
        many = "{n} annotations have no area: computed from the mask or the box"
        yield Problem(WARNING, "no-area", many, name)
    x, y, w, h = box
    value = f": {box} in {width}x{height}"
    if not has_area(box):
        many = "{n} boxes have no area: left out of training and evaluation"
        yield Problem(WARNING, "box-without-area", many, name, value=value)
    elif not width:
        return
    elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
        many = "{n} boxes lie wholly outside their image"
        rest = f"must have a bbox in its image of {width}x{height} pixels, got {box}"
        yield Problem(ERROR, "box-off-image", many, name, rest, value)
    else:
        if min(x, y) < -tolerance or x + w > width + tolerance or y + h > height + tolerance:
            many = f"{{n}} boxes reach more than {tolerance:g} pixels over the edge of their image"
            yield Problem(WARNING, "box-outside", many, name, value=value)
        if min(w, h) < 1:
            many = "{n} boxes are thinner than a pixel: MMDetection does not train on them"
            yield Problem(WARNING, "box-thin", many, name, value=value)


def mask_problems(
    one: dict, name: str, width: int, height: int, needed: bool, deep: bool = False
) -> Iterator[Problem]:
    """What is wrong with an annotation's mask, `needed` or not; `problems` has the arguments."""
    mask = one.get("segmentation")
    if not mask:
        if needed:
            many = "{n} annotations have an empty mask, others have masks: fit for boxes only"
            rest = "must have a mask: polygons, or RLE with size and counts, as its segmentation"
            yield Problem(ERROR, "no-mask", many, name, f"{rest}, got {mask!r}")
        return
    if isinstance(mask, list):
        found = list(_polygon_problems(mask, name, width, height))
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
        shown = str(polygons)
        rest += shown if len(shown) < 60 else f"{shown[:57]}..."
        yield Problem(ERROR, "no-polygon", many, name, rest)
    elif len(good) < len(polygons):
        many = "{n} masks have polygons of fewer than 3 points: left out beside the others"
        yield Problem(WARNING, "polygon-short", many, name)
    # Beyond these limits pycocotools' integers overflow.
    far = 10 * max(width, height, 1)
    if any(max(polygon) > far or min(polygon) < -far for polygon in good):
        many = "{n} masks have polygons far outside their image"
        rest = f"must have polygons in its image of {width}x{height} pixels"
        yield Problem(ERROR, "polygon-off-image", many, name, rest)


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
        rest = f"must have RLE of the image's size [{height}, {width}], got {size}"
        yield Problem(ERROR, "rle-size", many, name, rest)
    elif width and sum(counts) != width * height:
        # pycocotools would give what happens to be in memory for the rest.
        many = "{n} masks are broken RLE: counts do not add up to the size"
        rest = f"must have RLE whose counts add up to {width * height}, got {sum(counts)}"
        yield Problem(ERROR, "rle-broken", many, name, rest)
