"""Read and normalise COCO files, the same way for training and evaluation."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from typing import Any

from pycocotools.mask import area

from elsa_core.runtime.errors import UsageError

from .coco_rules import is_crowd, problems
from .mask_rules import mask_problems, polygon_parts, rle_of
from .problems import ERROR


def read_json(path: str) -> Any:
    """Read a JSON file in UTF-8, 16 or 32, with or without a byte order mark.

    Raises:
        UsageError: the file is missing, empty or cut off, or has numbers or nesting beyond the
            limits of Python's JSON reader; the message names the file.
    """
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # reading would wait for a writer
            raise UsageError(f"{path} cannot be read: it is a pipe")
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise UsageError(f"{path} is empty")
    try:
        return json.loads(content)  # detects UTF-8, 16 and 32 by the first bytes
    except RecursionError as error:
        raise UsageError(f"{path} nests lists or objects too deeply") from error
    except ValueError as error:  # UnicodeDecodeError is one
        why = " ".join(str(error).split())
        if why.startswith("Exceeds the limit"):
            raise UsageError(f"{path} has a whole number of thousands of digits") from error
        raise UsageError(f"{path} is cut off or not JSON: {why}") from error


def read_coco(path: str) -> dict[str, Any]:
    """Read a file with lists of images, annotations and categories.

    Raises:
        UsageError: as in `read_json`, or the file has another format.
    """
    coco = read_json(path)
    for key in ("images", "annotations", "categories"):
        found = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise UsageError(f"{path} is not in COCO's format: it has no list of {key}")
    return coco


def load_coco(path: str, masks: bool | None = False, name: str | None = None) -> dict[str, Any]:
    """Read a file as training and evaluation use it: without errors and `normalised`.

    Args:
        masks: as in `first_problem`.
        name: name of the file in messages, if it is a copy of another one.

    Raises:
        UsageError: as in `read_json`, or the file has an error or COCO's panoptic format.
    """
    coco = read_json(path)
    for key in ("images", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list):
            raise UsageError(f"{name or path} is not in COCO's format: it has no list of {key}")
    if problem := first_problem(coco, masks):
        raise UsageError(f"{name or path}: {problem}")
    return normalised(coco, masks)


def first_problem(coco: dict[str, Any], masks: bool | None = None) -> str | None:
    """Return the first error that `problems` finds, in half a sentence, or None.

    Args:
        coco: content with lists of images and categories; the list of annotations may be missing.
        masks: require masks (True), ignore them (False), or require them if any annotation has
            one (None).
    """
    for key in ("images", "categories", "annotations"):
        entries = coco.get(key)
        if entries is not None and not (
            isinstance(entries, list) and all(isinstance(one, dict) for one in entries)
        ):
            return f"{key} must be a list of objects"
    return next((str(one) for one in problems(coco, masks) if one.level == ERROR), None)


def normalised(coco: dict[str, Any], masks: bool | None = False) -> dict[str, Any]:
    """Fill in missing values of a file without errors, in place.

    - Annotation ids that are text or below 1 become numbers from 1: for pycocotools, a match with
      annotation 0 is no match.
    - `iscrowd` becomes 0 or 1. An annotation with `ignore` 1 (VOC's "difficult") becomes a crowd:
      training ignores it, and detections on it count as neither right nor wrong.
    - An `area` that is missing, null or not positive is computed from the mask's pixels, or
      without a mask from the part of the box inside the image.
    - Polygons of fewer than 3 points are removed, and so is the `segmentation` of an annotation
      whose mask has errors, which only runs without masks accept.

    Args:
        masks: as in `first_problem`, which found no error.
    """
    entries = coco.get("annotations") or []
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    renumber = any(not isinstance(one["id"], int) or one["id"] < 1 for one in entries)
    for number, one in enumerate(entries, start=1):
        if renumber:
            one["id"] = number
        one["iscrowd"] = int(is_crowd(one))
        one.pop("ignore", None)
        mask = one.get("segmentation")
        if not mask or (masks is False and not _is_drawable(one, *sizes[one["image_id"]])):
            one.pop("segmentation", None)
        elif isinstance(mask, list):
            one["segmentation"] = polygon_parts(mask)
        if one.get("area") is None or one["area"] <= 0:
            one["area"] = _area(one, *sizes[one["image_id"]])
    return coco


def _is_drawable(one: dict[str, Any], width: int, height: int) -> bool:
    found = mask_problems(one, "", width, height, needed=True)
    return all(problem.level != ERROR for problem in found)


def _area(one: dict[str, Any], width: int, height: int) -> float:
    if "segmentation" in one:
        return float(area(rle_of(one["segmentation"], width, height)))
    x, y, w, h = one["bbox"]
    across = min(x + w, width) - max(x, 0)
    down = min(y + h, height) - max(y, 0)
    return float(max(across, 0) * max(down, 0))


def missing_files(folder: str, names: Iterable[str]) -> list[str]:
    """Return the names that have no file in a folder.

    Lists each folder once, which is much faster than checking each file on a network drive.
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
