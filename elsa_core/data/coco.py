"""Reads a file in COCO's format, and gives it the one meaning that training and evaluation use."""

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
    """Raises UsageError, which names the file, for one that is missing, empty or cut off, or whose
    numbers or nesting go beyond what JSON's reader takes.

    UTF-8, 16 or 32; a byte order mark, which Windows' editors write, is left out.
    """
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # reading it would wait for a writer
            raise UsageError(f"{path} cannot be read: it is a pipe")
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise UsageError(f"{path} is empty")
    try:
        return json.loads(content)  # which knows UTF-8, 16 and 32 by their first bytes
    except RecursionError as error:
        raise UsageError(f"{path} nests lists or objects too deeply") from error
    except ValueError as error:  # UnicodeDecodeError is one
        why = " ".join(str(error).split())
        if why.startswith("Exceeds the limit"):
            raise UsageError(f"{path} has a whole number of thousands of digits") from error
        raise UsageError(f"{path} is cut off or not JSON: {why}") from error


def read_coco(path: str) -> dict[str, Any]:
    """A file with lists of images, annotations and categories.

    Raises UsageError, which names the file, as `read_json` does, and for another format.
    """
    coco = read_json(path)
    for key in ("images", "annotations", "categories"):
        found = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise UsageError(f"{path} is not in COCO's format: it has no list of {key}")
    return coco


def load_coco(path: str, masks: bool | None = False, name: str | None = None) -> dict[str, Any]:
    """A file as training and evaluation see it: without errors, and `normalised`.

    Args:
        masks: as for `first_problem`.
        name: of the file in messages, where it is a copy of another one.

    Raises UsageError, which names the file, as `read_json` does, and for the first error in it;
    COCO's panoptic format is one.
    """
    coco = read_json(path)
    for key in ("images", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list):
            raise UsageError(f"{name or path} is not in COCO's format: it has no list of {key}")
    if problem := first_problem(coco, masks):
        raise UsageError(f"{name or path}: {problem}")
    return normalised(coco, masks)


def first_problem(coco: dict[str, Any], masks: bool | None = None) -> str | None:
    """The first error that `problems` finds, in half a sentence, or None.

    Args:
        coco: with lists of images and categories; that of annotations may be missing.
        masks: whether masks are needed (True), not looked at (False), or needed once one
            annotation has one (None).
    """
    for key in ("images", "categories", "annotations"):
        entries = coco.get(key)
        if entries is not None and not (
            isinstance(entries, list) and all(isinstance(one, dict) for one in entries)
        ):
            return f"{key} must be a list of objects"
    return next((str(one) for one in problems(coco, masks) if one.level == ERROR), None)


def normalised(coco: dict[str, Any], masks: bool | None = False) -> dict[str, Any]:
    """Writes out what a file without errors leaves open; changes `coco` itself.

    - Annotation ids that are text, or below 1, become numbers from 1: pycocotools takes a match
      with annotation 0 for none.
    - `iscrowd` becomes 0 or 1. An annotation with `ignore` 1, VOC's "difficult", becomes a crowd:
      no training learns it, and detections on it count as neither right nor wrong.
    - An `area` that is missing, null or not above 0 is computed: the pixels of the mask, without a
      mask those of the box in its image.
    - Polygons of fewer than 3 points go. An annotation whose mask has errors, which only runs
      without masks do not refuse, has no `segmentation`.

    Args:
        masks: as for `first_problem`, which found none.
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
