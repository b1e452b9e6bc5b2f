"""Validates a file in COCO's format, once, before a training that takes days."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pycocotools.mask
from tqdm import tqdm

from .coco import missing_files
from .report import ERROR, EXAMPLES, WARNING, Finding
from .rle import compressed_counts

TOLERANCE = 1.0


class Findings:
    """Counts what is wrong, by rule, with the first few examples of each."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: dict[str, Finding] = {}

    def add(self, level: str, rule: str, text: str, example: str) -> None:
        finding = self.found.setdefault(rule, Finding(level, rule, self.where, text, 0))
        finding.count += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(example)

    def list(self) -> list[Finding]:
        for finding in self.found.values():
            finding.text = finding.text.format(n=f"{finding.count:,}")
        return list(self.found.values())


def validate(
    path: str,
    coco: dict[str, Any],
    *,
    categories: int | None = None,
    tolerance: float = TOLERANCE,
    progress: bool = False,
) -> list[Finding]:
    """What is wrong with the content of a file; image files are not looked at.

    Args:
        path: the file's, for the findings.
        coco: what `coco.read_coco` gave.
        categories: how many there must be.
        tolerance: pixels that a box may reach over the edge of its image.
    """
    findings = Findings(path)
    images = _check_images(coco["images"], findings)
    known = _check_categories(coco, categories, findings)
    _check_ids(coco["annotations"], "annotation", findings)
    masks = any(one.get("segmentation") for one in coco["annotations"])
    for one in tqdm(coco["annotations"], "annotations", disable=None if progress else True):
        name = f"annotation {one.get('id')}"
        if "image_id" not in one or _key(one["image_id"]) not in images:
            text = "{n} annotations belong to images that are not in the file"
            findings.add(ERROR, "unknown-image", text, f"{name} of image {one.get('image_id')}")
            continue
        if _key(one.get("category_id")) not in known:
            text = "{n} annotations have a category that is not in the file"
            example = f"{name} of category {one.get('category_id')}"
            findings.add(ERROR, "unknown-category", text, example)
        width, height = images[_key(one["image_id"])]
        _check_box(one, name, width, height, tolerance, findings)
        for level, rule, text in _mask_problems(one, width, height, masks):
            findings.add(level, rule, text, name)
    if not masks and coco["annotations"]:
        text = "no annotation has a mask: fit for boxes only"
        findings.found["no-masks"] = Finding(WARNING, "no-masks", path, text)
    return findings.list()


def missing_images(path: str, coco: dict[str, Any], folder: str) -> list[Finding]:
    """Whether each image has a file; reads each folder once."""
    names = [str(one["file_name"]) for one in coco["images"] if "file_name" in one]
    findings = Findings(path)
    for name in missing_files(folder, names):
        text = f"{{n}} of {len(names):,} images have no file in {folder}"
        findings.add(ERROR, "missing-image-file", text, name)
    return findings.list()


def _key(value: Any) -> Any:
    """An id that can be looked up; no id of a file is a NaN."""
    return value if isinstance(value, (int, str)) else math.nan


def _check_ids(entries: list[dict], what: str, findings: Findings) -> None:
    seen = set()
    for entry in entries:
        if not isinstance(entry.get("id"), (int, str)):
            text = f"{{n}} {what} entries have no id"
            findings.add(ERROR, f"no-{what}-id", text, str(entry.get("id")))
        elif entry["id"] in seen:
            text = f"{{n}} {what} ids are there more than once"
            findings.add(ERROR, f"duplicate-{what}-id", text, str(entry["id"]))
        else:
            seen.add(entry["id"])


def _check_images(entries: list[dict], findings: Findings) -> dict[Any, tuple[int, int]]:
    """Width and height by id; (0, 0) where they are no sizes."""
    _check_ids(entries, "image", findings)
    if not entries:
        findings.add(ERROR, "no-images", "has no images", "images: []")
    sizes: dict[Any, tuple[int, int]] = {}
    names: set[Any] = set()
    for entry in entries:
        width, height = entry.get("width"), entry.get("height")
        if not all(isinstance(side, int) and side > 0 for side in (width, height)):
            text = "{n} images have no width and height above 0"
            findings.add(ERROR, "image-size", text, f"image {entry.get('id')}")
            width = height = 0
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            text = "{n} images have no file_name"
            findings.add(ERROR, "no-file-name", text, f"image {entry.get('id')}")
        elif name in names:
            findings.add(WARNING, "duplicate-file-name", "{n} files are named twice", name)
        else:
            names.add(name)
        sizes[_key(entry.get("id"))] = width, height
    return sizes


def _check_categories(coco: dict[str, Any], number: int | None, findings: Findings) -> set[Any]:
    entries = coco["categories"]
    _check_ids(entries, "category", findings)
    if number is not None and len(entries) != number:
        text = f"has {len(entries)} categories instead of {number}"
        names = ", ".join(str(entry.get("name")) for entry in entries[:EXAMPLES])
        findings.add(ERROR, "number-of-categories", text, names)
    used = {_key(one.get("category_id")) for one in coco["annotations"]}
    for entry in entries:
        if not isinstance(entry.get("name"), str) or not entry["name"]:
            text = "{n} categories have no name"
            findings.add(ERROR, "no-category-name", text, f"category {entry.get('id')}")
        if coco["annotations"] and _key(entry.get("id")) not in used:
            text = "{n} categories have no annotation"
            findings.add(WARNING, "unused-category", text, str(entry.get("name")))
    return {_key(entry.get("id")) for entry in entries}


def _check_box(
    one: dict, name: str, width: int, height: int, tolerance: float, findings: Findings
) -> None:
    box = one.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        text = "{n} annotations have no bbox of 4 finite numbers [x, y, width, height]"
        findings.add(ERROR, "box-form", text, f"{name}: {box}")
        return
    if not _are_numbers([one.get("area")]):
        findings.add(ERROR, "no-area", "{n} annotations have no area, a number", name)
    x, y, w, h = box
    example = f"{name}: {box} in {width}x{height}"
    if w <= 0 or h <= 0:
        findings.add(WARNING, "box-without-area", "{n} boxes have no area", example)
    elif not width:
        return
    elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
        findings.add(ERROR, "box-off-image", "{n} boxes lie wholly outside their image", example)
    elif min(x, y) < -tolerance or x + w > width + tolerance or y + h > height + tolerance:
        text = f"{{n}} boxes reach more than {tolerance:g} pixels over the edge of their image"
        findings.add(WARNING, "box-outside", text, example)


def _mask_problems(
    one: dict, width: int, height: int, masks: bool
) -> Iterator[tuple[str, str, str]]:
    """Level, rule and text for each thing that is wrong with an annotation's mask.

    Args:
        masks: whether other annotations have masks.
    """
    mask = one.get("segmentation")
    if not mask:
        if masks:
            yield ERROR, "no-mask", "{n} annotations have an empty mask, others have masks"
    elif isinstance(mask, list):
        yield from _polygon_problems(mask, width, height)
    elif isinstance(mask, dict):
        yield from _rle_problems(mask, width, height)
    else:
        yield ERROR, "mask-form", "{n} masks are neither polygons nor RLE"


def _polygon_problems(polygons: list, width: int, height: int) -> Iterator[tuple[str, str, str]]:
    if not all(isinstance(polygon, list) and _are_numbers(polygon) for polygon in polygons):
        yield ERROR, "polygon-form", "{n} masks have polygons that are no lists of finite numbers"
        return
    good = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if len(good) < len(polygons):
        yield WARNING, "polygon-short", "{n} masks have polygons of fewer than 3 points"
    # Beyond these limits pycocotools' integers overflow.
    far = 10 * max(width, height, 1)
    if any(abs(number) > far for polygon in good for number in polygon):
        yield ERROR, "polygon-off-image", "{n} masks have polygons far outside their image"
    elif width and not _covers(pycocotools.mask.frPyObjects(good, height, width) if good else []):
        yield WARNING, "mask-empty", "{n} masks cover no pixel"


def _rle_problems(rle: dict, width: int, height: int) -> Iterator[tuple[str, str, str]]:
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = compressed_counts(counts)
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
        yield ERROR, "rle-form", "{n} masks are broken RLE: no size and counts of 0 or more"
        return
    size = rle.get("size")
    if not isinstance(size, list) or len(size) != 2 or (width and size != [height, width]):
        yield ERROR, "rle-size", "{n} masks in RLE are not as large as their image"
    elif sum(counts) != size[0] * size[1]:
        # pycocotools would give what happens to be in memory for the rest.
        yield ERROR, "rle-broken", "{n} masks are broken RLE: counts do not add up to the size"
    elif not _covers([pycocotools.mask.frPyObjects({"size": size, "counts": counts}, *size)]):
        yield WARNING, "mask-empty", "{n} masks cover no pixel"


def _covers(parts: list[dict]) -> bool:
    return any(pycocotools.mask.area(part) for part in parts)


def _are_numbers(values: list) -> bool:
    return all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )
