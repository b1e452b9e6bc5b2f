"""Reads a file in COCO's format, and finds in seconds what no training on it can survive."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from .errors import DataError


def read_json(path: str) -> Any:
    """Raises DataError, which names the file, for one that is missing, empty or cut off."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise DataError(f"{path} is empty")
    try:
        return json.loads(content)
    except ValueError as error:  # UnicodeDecodeError is one
        raise DataError(f"{path} is cut off or not JSON: {' '.join(str(error).split())}") from error


def read_coco(path: str) -> dict[str, Any]:
    """A file with lists of images, annotations and categories.

    Raises DataError, which names the file, as `read_json` does, and for another format.
    """
    coco = read_json(path)
    for key in ("images", "annotations", "categories"):
        found = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise DataError(f"{path} is not in COCO's format: it has no list of {key}")
    return coco


def first_problem(coco: dict[str, Any]) -> str | None:
    """What is wrong between images, annotations and categories, in half a sentence, or None.

    Args:
        coco: with lists of images and categories; that of annotations may be missing, and that of
            COCO's panoptic format is left alone.
    """
    for key in ("images", "categories", "annotations"):
        if not all(isinstance(one, dict) for one in coco.get(key) or []):
            return f"{key} must be a list of objects"
    for image in coco["images"]:
        for key, kind in (("id", (int, str)), ("width", (int,)), ("height", (int,))):
            if not isinstance(image.get(key), kind):
                return f"image {image.get('file_name')} has no {key}, got {image.get(key)!r}"
    images = {image["id"] for image in coco["images"]}
    categories = {category.get("id") for category in coco["categories"]}
    seen = set()
    for one in coco.get("annotations") or []:
        if "segments_info" in one:  # panoptic
            continue
        name = f"annotation {one.get('id')}"
        if not isinstance(one.get("id"), (int, str)) or one["id"] in seen:
            return f"{name}: its id is missing or there twice"
        seen.add(one["id"])
        image, category = one.get("image_id"), one.get("category_id")
        if not isinstance(image, (int, str)) or image not in images:
            return f"{name} belongs to image {image}, which is not in the file"
        if not isinstance(category, (int, str)) or category not in categories:
            return f"{name} has category {category}, which is not in the file"
        box = one.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            return f"{name} must have a bbox of 4 numbers, got {box}"
        if not _is_mask(one.get("segmentation")):
            return f"{name} must have polygons or RLE with size and counts as its segmentation"
    return None


def missing_files(folder: str, names: Iterable[str]) -> list[str]:
    """Those of the names that a folder has no file for.

    Reads each folder once: far cheaper than asking for every file on a network drive.
    """
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, base = os.path.split(os.path.join(folder, name))
        if parent not in listed:
            listed[parent] = (
                set(os.listdir(parent or ".")) if os.path.isdir(parent or ".") else set()
            )
        if base not in listed[parent]:
            missing.append(name)
    return missing


def _is_mask(mask: Any) -> bool:
    """Whether it has the form of one, or there is none."""
    if not isinstance(mask, dict):
        return mask is None or isinstance(mask, list)
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(map(_is_whole, size)):
        return False
    return isinstance(counts, str) or (isinstance(counts, list) and all(map(_is_whole, counts)))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value
