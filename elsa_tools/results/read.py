"""Read results in COCO's format, which both frameworks write, and check them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from elsa_core.data.coco import read_json
from elsa_core.data.coco_rules import are_numbers, is_box
from elsa_core.data.mask_rules import mask_problems, rle_of
from elsa_core.data.problems import ERROR, shown
from elsa_core.runtime.errors import UsageError

FORMS = (
    "a list of detections with image_id, category_id and score, as Detectron2's "
    "coco_instances_results.json and MMDetection's *.bbox.json and *.segm.json"
)
_KEYS = ("image_id", "category_id", "score", "bbox")


def read_results(path: str) -> list[dict[str, Any]]:
    """Read a list of detections; `check_results` checks its entries.

    Raises:
        UsageError: as in `read_json`, or the file has another format.
    """
    entries = read_json(path)
    if isinstance(entries, dict) and "annotations" in entries:
        raise UsageError(f"{path} is a file of annotations, results are {FORMS}")
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise UsageError(f"{path} has no results: they are {FORMS}")
    return entries


def tasks_of(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Return "bbox" if all detections have a box, and "segm" if all have a mask."""
    keys = {"bbox": "bbox", "segm": "segmentation"}
    return [task for task, key in keys.items() if all(key in one for one in entries)]


def check_results(
    entries: Sequence[dict[str, Any]],
    images: Mapping[Any, dict[str, Any]],
    categories: Collection[Any],
    task: str,
) -> None:
    """Check detections, and turn each mask into compressed RLE, in place.

    Args:
        images: images of the annotations by id.
        categories: their ids.
        task: "bbox" or "segm".

    Raises:
        UsageError: for the first detection that has an error.
    """
    for number, one in enumerate(entries, start=1):
        name = f"detection {number}"
        image, category, score, box = (one.get(key) for key in _KEYS)
        if type(image) not in (int, str) or image not in images:
            raise UsageError(
                f"{name} is on image {shown(image)}, which the annotations do not have"
            )
        if type(category) not in (int, str) or category not in categories:
            raise UsageError(
                f"{name} has category {shown(category)}, which the annotations do not have"
            )
        if not are_numbers([score]):
            raise UsageError(f"{name} must have a finite number as its score, got {shown(score)}")
        if task == "bbox":
            if not (isinstance(box, list) and is_box(box) and min(box[2:]) >= 0):
                raise UsageError(
                    f"{name} must have a bbox [x, y, width, height] of finite numbers, "
                    f"got {shown(box)}"
                )
        else:
            size = images[image]["width"], images[image]["height"]
            found = mask_problems(one, name, *size, needed=True)
            if problem := next((str(it) for it in found if it.level == ERROR), None):
                raise UsageError(problem)
            one["segmentation"] = rle_of(one["segmentation"], *size)
