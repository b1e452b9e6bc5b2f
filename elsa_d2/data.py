"""Data sets in COCO's format: registered from the config, checked before a run begins."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from elsa_core.errors import UsageError
from elsa_data.coco import first_problem, missing_files, read_json
from elsa_data.errors import DataError

from .coco_json import load_coco_json


def register_coco_datasets(cfg: CfgNode) -> None:
    """Registers the data sets that DATASETS.REGISTER_COCO lists.

    Relative paths start at the working directory. Raises UsageError for entries of another form
    and for a name that stands for another data set already.
    """
    for entry in cfg.DATASETS.REGISTER_COCO:
        if (
            not isinstance(entry, (list, tuple))
            or len(entry) != 3
            or not all(isinstance(part, str) for part in entry)
        ):
            raise UsageError(
                "DATASETS.REGISTER_COCO must be a list of [name, annotation file, image folder], "
                f"got {entry!r}"
            )
        name, json_file, image_root = entry
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(load_coco_json, json_file, image_root, name))
            MetadataCatalog.get(name).set(
                json_file=json_file, image_root=image_root, evaluator_type="coco"
            )
            continue
        known = MetadataCatalog.get(name)
        if (known.get("json_file"), known.get("image_root")) != (json_file, image_root):
            raise UsageError(
                f"DATASETS.REGISTER_COCO names {name!r}, which is registered as another data set"
            )


def check_dataset(
    name: str,
    num_classes: int | None = None,
    annotated: bool = True,
    masks: bool | None = False,
) -> None:
    """Raises UsageError unless a registered data set is there and whole.

    A data set in another format than COCO's is checked for its registration alone.

    Args:
        name: in Detectron2's DatasetCatalog.
        num_classes: how many categories it must have; None for any number.
        annotated: whether it must have annotations, as a test set of a contest has not.
        masks: whether each annotation must have a mask; None: once one has.
    """
    if name not in DatasetCatalog:
        raise UsageError(
            f"data set {name!r} is not registered: list it in DATASETS.REGISTER_COCO as "
            "[name, annotation file, image folder]"
        )
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco":
        return
    json_file, image_root = metadata.json_file, metadata.image_root
    coco = _read_json(name, json_file)
    _check_annotations(name, json_file, coco, annotated, masks)
    if num_classes is not None and len(coco["categories"]) != num_classes:
        raise UsageError(
            f"data set {name!r} has {len(coco['categories'])} categories, "
            f"but MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}"
        )
    _check_images(name, image_root, [image["file_name"] for image in coco["images"]])


def _read_json(name: str, json_file: str) -> Any:
    try:
        return read_json(json_file)
    except DataError as error:
        raise UsageError(
            f"annotation file of data set {name!r}: {error} (working directory: {os.getcwd()})"
        ) from error


def _check_annotations(
    name: str, json_file: str, coco: Any, annotated: bool, masks: bool | None
) -> None:
    what = f"annotation file {json_file} of data set {name!r}"
    if not isinstance(coco, dict):
        raise UsageError(f"{what} is not in COCO's format")
    keys = ["images", "categories"]
    if annotated or "annotations" in coco:
        keys.append("annotations")
    for key in keys:
        if not isinstance(coco.get(key), list):
            raise UsageError(f"{what} is not in COCO's format: it has no list of {key}")
        if not coco[key]:
            raise UsageError(f"{what} has no {key}")
    if problem := first_problem(coco, masks):
        raise UsageError(f"{what}: {problem}")


def _check_images(name: str, image_root: str, file_names: list[str]) -> None:
    what = f"image folder {image_root} of data set {name!r}"
    if not os.path.isdir(image_root):
        raise UsageError(f"{what} does not exist (working directory: {os.getcwd()})")
    missing = missing_files(image_root, file_names)
    if missing:
        raise UsageError(
            f"{what} lacks {len(missing)} of {len(file_names)} images, the first is {missing[0]}"
        )
