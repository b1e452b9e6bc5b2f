"""Detectron2's records of a file in COCO's format."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools.mask import frPyObjects

from elsa_core.data.classes import difference, labels_by_name, ordered_names
from elsa_core.data.coco import load_coco
from elsa_core.data.coco_rules import has_area
from elsa_core.runtime.errors import UsageError

logger = logging.getLogger(__name__)


def load_coco_json(
    json_file: str, image_root: str, dataset_name: str, classes: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Detectron2's function of this name, for every file that the checker accepts.

    Also reads what Detectron2's fails at or ignores: a byte order mark, `ignore` (the annotation
    becomes a crowd), and annotations without `iscrowd` (0). Boxes without area are dropped, and the
    log says how many. Sets thing_classes and thing_dataset_id_to_contiguous_id in the metadata.

    Args:
        classes: class names by label; None: the categories by ascending id.

    Raises:
        UsageError: for a file with errors, or with other categories than `classes`.
    """
    try:
        coco = load_coco(json_file)
        names = ordered_names(coco["categories"])
        classes = list(classes or names)
        labels = labels_by_name(classes, coco["categories"])
    except UsageError as error:
        raise UsageError(f"annotation file of data set {dataset_name!r}: {error}") from error
    if moved := difference(classes, names):
        label, wanted, found = moved
        logger.warning(
            f"data set {dataset_name!r} is mapped by the names of its categories: class {label} is "
            f"{wanted!r}, not {found!r} as by ascending id"
        )
    MetadataCatalog.get(dataset_name).set(
        thing_classes=classes, thing_dataset_id_to_contiguous_id=labels
    )
    records = {
        image["id"]: {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        for image in sorted(coco["images"], key=lambda one: one["id"])
    }
    entries = coco.get("annotations") or []
    for one in entries:
        if has_area(one["bbox"]):
            annotations = records[one["image_id"]]["annotations"]
            annotations.append(_instance(one, labels[one["category_id"]]))
    kept = sum(len(record["annotations"]) for record in records.values())
    rest = f", {len(entries) - kept} boxes without area left out" if kept < len(entries) else ""
    logger.info(f"{json_file}: {len(records)} images, {kept} annotations{rest}")
    return list(records.values())


def _instance(one: dict[str, Any], label: int) -> dict[str, Any]:
    instance = {
        "iscrowd": one["iscrowd"],
        "bbox": one["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": label,
    }
    if mask := one.get("segmentation"):
        if isinstance(mask, dict) and isinstance(mask["counts"], list):
            mask = frPyObjects(mask, *mask["size"])
        instance["segmentation"] = mask
    if points := one.get("keypoints"):
        # From the index of a pixel to the position of its center, as in boxes and masks.
        instance["keypoints"] = [v + 0.5 if i % 3 != 2 else v for i, v in enumerate(points)]
    return instance
