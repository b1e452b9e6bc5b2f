"""Rules for COCO files, shared by the checker and by runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from elsa_core.runtime.errors import UNPRINTABLE

from .images import LONGEST_SIDE, MOST_ELONGATED, MOST_PIXELS
from .mask_rules import mask_problems
from .problems import ERROR, FARTHEST, WARNING, Problem, are_numbers, named, shown

TOLERANCE = 1.0
# End of COCO's widest area range; pycocotools ignores larger objects.
LARGEST_AREA = 1e10


def problems(
    coco: dict[str, Any],
    masks: bool | None = None,
    *,
    annotations: list[dict] | None = None,
    tolerance: float = TOLERANCE,
    deep: bool = False,
) -> Iterator[Problem]:
    """Yield all problems of a file's content, in the order of the file.

    Args:
        coco: content with lists of objects as images and categories. The list of annotations may
            be missing, as in test sets.
        masks: require masks (True), ignore them (False), or require them if any annotation has
            one (None).
        annotations: annotations of `coco`, as an iterable that shows progress.
        tolerance: pixels that a box may extend beyond its image.
        deep: also draw each mask to check that it covers a pixel.
    """
    sizes: dict[Any, tuple[int, int]] = {}
    yield from _images(coco["images"], sizes)
    entries = coco.get("annotations")
    yield from _categories(coco["categories"], entries)
    if entries and any("segments_info" in one for one in entries):
        text = "is of COCO's panoptic format, which has no objects with boxes"
        yield Problem(ERROR, "panoptic", text, f"annotation {named(entries[0].get('id'))}")
        return
    if entries is None:
        return
    known = {_key(category.get("id")) for category in coco["categories"]}
    yield from _ids(entries, "annotation")
    given = any(one.get("segmentation") for one in entries)
    needed, objects = given if masks is None else masks, 0
    for one in entries if annotations is None else annotations:
        name = f"annotation {named(one.get('id'))}"
        if (image := _key(one.get("image_id"))) not in sizes:
            many = "{n} annotations belong to images that are not in the file"
            value = f" of image {named(one.get('image_id'))}"
            rest = f"belongs to image {named(one.get('image_id'))}, which is not in the file"
            yield Problem(ERROR, "unknown-image", many, name, rest, value)
            continue
        if _key(one.get("category_id")) not in known:
            many = "{n} annotations have a category that is not in the file"
            value = f" of category {named(one.get('category_id'))}"
            rest = f"has category {named(one.get('category_id'))}, which is not in the file"
            yield Problem(ERROR, "unknown-category", many, name, rest, value)
        yield from _flags(one, name)
        if one.get("keypoints"):
            yield from _keypoints(one["keypoints"], name)
        yield from _box(one, name, *sizes[image], tolerance)
        objects += not is_crowd(one) and is_box(one.get("bbox")) and has_area(one["bbox"])
        if masks is not False:
            yield from mask_problems(one, name, *sizes[image], needed, deep)
    if not objects:
        text = "no annotation is an object: a box with an area that is no crowd"
        yield Problem(ERROR, "no-objects", text, f"{len(entries)} annotations")
    elif not given and masks is None:
        yield Problem(WARNING, "no-masks", "no annotation has a mask: usable for boxes only", "")


# Control characters: NUL ends a file name, a line feed ends a line of a log.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")


def is_crowd(one: dict[str, Any]) -> bool:
    """Whether training and evaluation ignore an annotation: a crowd, or VOC's "difficult"."""
    return bool(one.get("iscrowd") or one.get("ignore"))


def is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and are_numbers(box)


def has_area(box: list[float]) -> bool:
    """Whether a box [x, y, width, height] keeps its size in float32 to within 1 %.

    Both frameworks predict edges in float32, so that thinner boxes can never be found.
    """
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return False
    if min(width, height) > 1e-4 * max(abs(x) + width, abs(y) + height):
        return True
    left, right, top, bottom = map(float, np.array([x, x + width, y, y + height], np.float32))
    return abs(right - left - width) <= 0.01 * width and abs(bottom - top - height) <= 0.01 * height


def _key(value: Any) -> Any:
    """Return an id for lookup. True and 1.0 are not ids, although Python treats them as 1."""
    return value if type(value) in (int, str) else float("nan")


def _ids(entries: list[dict], what: str) -> Iterator[Problem]:
    seen: set[Any] = set()
    for entry in entries:
        found = entry.get("id")
        name = f"{what} {named(what == 'image' and entry.get('file_name') or found)}"
        if type(found) not in (int, str):
            many = f"{{n}} {what} entries have no id, a whole number or text"
            yield Problem(ERROR, f"no-{what}-id", many, name, f"has no id, got {shown(found)}")
        elif found in seen:
            many = f"{{n}} {what} ids are used more than once"
            rest = f"has the id {shown(found)}, which is used twice"
            yield Problem(ERROR, f"duplicate-{what}-id", many, name, rest, f" (id {shown(found)})")
        else:
            seen.add(found)
    if len({type(found) for found in seen}) > 1:
        text = next(found for found in seen if isinstance(found, str))
        many = f"{what} ids are numbers and texts: 1 and '1' may or may not be the same"
        yield Problem(ERROR, f"mixed-{what}-ids", many, f"{what} {shown(text)}")
    elif what == "annotation":
        for found in seen:
            if isinstance(found, str) or found < 1:
                many = "{n} annotation ids are 0 or less, or text: numbered from 1 in memory"
                yield Problem(WARNING, "annotation-id-form", many, f"annotation {named(found)}")


def _images(entries: list[dict], sizes: dict[Any, tuple[int, int]]) -> Iterator[Problem]:
    """Yield the problems of images; fill in width and height by id, (0, 0) if invalid."""
    yield from _ids(entries, "image")
    if not entries:
        yield Problem(ERROR, "no-images", "has no images", "images: []")
    names: dict[str, Any] = {}
    for entry in entries:
        file = entry.get("file_name")
        name = f"image {named(file or entry.get('id'))}"
        sides: Any = (entry.get("width"), entry.get("height"))
        wrong = next((k for k in ("width", "height") if type(entry.get(k)) is not int), None)
        if wrong is not None or not (0 < min(sides) and max(sides) <= LONGEST_SIDE):
            many = f"{{n}} images have no width and height of 1 to {LONGEST_SIDE}, whole numbers"
            rest = f"must have a width and height of 1 to {LONGEST_SIDE} pixels, got {shown(sides)}"
            if wrong is not None:
                rest = f"has no {wrong}, got {shown(entry.get(wrong))}"
            yield Problem(ERROR, "image-size", many, name, rest)
            sides = 0, 0
        elif sides[0] * sides[1] > MOST_PIXELS:
            many = f"{{n}} images have more than the {MOST_PIXELS:,} pixels that are read"
            rest = f"must have at most {MOST_PIXELS:,} pixels, got {shown(sides)}"
            yield Problem(ERROR, "image-size", many, name, rest)
            sides = 0, 0
        elif max(sides) > MOST_ELONGATED * min(sides):
            many = f"{{n}} images are more than {MOST_ELONGATED} times as long as they are wide"
            rest = f"must be at most {MOST_ELONGATED} times as long as it is wide, got {sides}"
            yield Problem(ERROR, "image-shape", many, name, rest)
        if not isinstance(file, str) or not file:
            many, rest = "{n} images have no file_name", f"has no file_name, got {shown(file)}"
            yield Problem(ERROR, "no-file-name", many, f"image {named(entry.get('id'))}", rest)
        elif _CONTROL.search(file):
            many = "{n} images have control characters in their file_name"
            yield Problem(ERROR, "file-name-form", many, name, f"has them in {shown(file)}")
        elif names.get(file, sides) != sides:
            many = "{n} files are named twice, with different sizes"
            rest = f"must have one size, got {shown(names[file])} and {shown(sides)}"
            yield Problem(ERROR, "image-size", many, f"image {named(file)}", rest)
        elif file in names:
            yield Problem(WARNING, "duplicate-file-name", "{n} files are named twice", named(file))
        else:
            names[file] = sides
            if file.startswith("/") or ".." in file.split("/"):
                many = "{n} images lie outside the folder of images, which their file_name leaves"
                yield Problem(WARNING, "file-elsewhere", many, named(file))
        sizes[_key(entry.get("id"))] = sides


def _categories(entries: list[dict], annotations: list[dict] | None) -> Iterator[Problem]:
    yield from _ids(entries, "category")
    if not entries:
        yield Problem(ERROR, "no-categories", "has no categories", "categories: []")
    used = {_key(one.get("category_id")) for one in annotations or []}
    names: set[str] = set()
    for entry in entries:
        name, label = f"category {named(entry.get('id'))}", entry.get("name")
        if not isinstance(label, str) or not label:
            rest = f"has no name, got {shown(label)}"
            yield Problem(ERROR, "no-category-name", "{n} categories have no name", name, rest)
        elif UNPRINTABLE.search(label) or _CONTROL.search(label):
            many = "{n} category names have control characters"
            rest = f"must have a name without control characters, got {shown(label)}"
            yield Problem(ERROR, "category-name-form", many, name, rest)
        elif label in names:
            rest = f"has the name {shown(label)}, which is used twice"
            many = "{n} category names are used more than once"
            yield Problem(ERROR, "duplicate-category-name", many, name, rest, f" {named(label)}")
        else:
            names.add(label)
        if annotations and _key(entry.get("id")) not in used:
            many = "{n} categories have no annotation"
            yield Problem(WARNING, "unused-category", many, str(named(label)))


def _flags(one: dict, name: str) -> Iterator[Problem]:
    for key in ("iscrowd", "ignore"):
        value = one.get(key)
        if value is None or (isinstance(value, (bool, int, float)) and value in (0, 1)):
            continue
        many = f"{{n}} annotations have an {key} that is neither 0 nor 1"
        rest = f"must have an {key} of 0 or 1, got {shown(value)}"
        yield Problem(ERROR, f"{key}-form", many, name, rest, f": {shown(value)}")
    if one.get("iscrowd") is None:
        many = "{n} annotations have no iscrowd: read as 0"
        yield Problem(WARNING, "no-iscrowd", many, name)
    if one.get("ignore"):
        many = "{n} annotations have ignore 1: ignored in training and evaluation, as crowds"
        yield Problem(WARNING, "ignored", many, name)


def _keypoints(points: Any, name: str) -> Iterator[Problem]:
    if not (isinstance(points, list) and len(points) % 3 == 0 and are_numbers(points)):
        many = "{n} annotations have keypoints that are no numbers [x, y, visibility, ...]"
        rest = f"must have keypoints [x, y, visibility, ...], got {shown(points)}"
        yield Problem(ERROR, "keypoints-form", many, name, rest)


def _box(one: dict, name: str, width: int, height: int, tolerance: float) -> Iterator[Problem]:
    box: Any = one.get("bbox")
    area = one.get("area")
    if not is_box(box):
        many = "{n} annotations have no bbox of 4 finite numbers [x, y, width, height]"
        rest = f"must have a bbox of 4 numbers, got {shown(box)}"
        yield Problem(ERROR, "box-form", many, name, rest, f": {shown(box)}")
        return
    if area is not None and not (are_numbers([area]) and area <= LARGEST_AREA):
        many = f"{{n}} annotations have an area that is no number up to {LARGEST_AREA:.0e}"
        rest = f"must have an area, a number up to {LARGEST_AREA:.0e}, got {shown(area)}"
        yield Problem(ERROR, "area-form", many, name, rest, f": {shown(area)}")
    elif area is None or area <= 0:
        many = "{n} annotations have no area: computed from the mask or the box"
        yield Problem(WARNING, "no-area", many, name)
    x, y, w, h = box
    value = f": {box} in {width}x{height}"
    far = FARTHEST * max(width, height)
    if width and not -far <= min(x, y, x + w, y + h) <= max(x, y, x + w, y + h) <= far:
        many = f"{{n}} boxes reach further than {FARTHEST} times their image"
        rest = f"must have a bbox within {FARTHEST} times its {width}x{height} pixels, got {box}"
        yield Problem(ERROR, "box-far", many, name, rest, value)
    elif not has_area(box):
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
