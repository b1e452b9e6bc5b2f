"""Data sets in COCO's format: registration from the config, and checks before a run.

A run has one order of classes: that of the checkpoint it evaluates, or of its first training part.
The categories of every other part are mapped to labels by name.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from elsa_core.data.classes import difference, labels_by_name, ordered_names
from elsa_core.data.coco import first_problem, missing_files, read_json
from elsa_core.runtime.errors import UsageError

from .classes import class_names
from .coco_json import load_coco_json
from .keypoints import set_keypoint_names, wrong_keypoints
from .registration import check_num_classes, entries, is_registered

logger = logging.getLogger(__name__)
FORM = "[name, annotation file, image folder]"
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class CocoPart:
    """The function that DatasetCatalog calls for the records of a data set (`load_coco_json`).

    Attributes:
        order: class names by label, or the data set that has them; None, or an unknown data set:
            the categories by ascending id.
    """

    name: str
    json_file: str
    image_root: str
    order: tuple[str, ...] | str | None = None

    def __call__(self) -> list[dict[str, Any]]:
        return load_coco_json(self.json_file, self.image_root, self.name, self._order())

    def _order(self) -> list[str] | None:
        if not isinstance(self.order, str):
            return list(self.order) if self.order else None
        names = class_names(self.order)
        if names is None:
            logger.warning(
                f"data set {self.order!r} of DATASETS.TRAIN is not there, nor does the checkpoint "
                f"name its classes: they are those of {self.name!r} by ascending id"
            )
        return names


def register_coco_datasets(cfg: CfgNode, classes: Sequence[str] | None = None) -> None:
    """Registers the data sets that DATASETS.REGISTER_COCO lists.

    Paths are relative to the working directory. Raises UsageError for entries of another form and
    for a name that is registered for another data set.

    Args:
        classes: class names by label, for each data set; None: those of the first of
            DATASETS.TRAIN.
    """
    first = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else None
    for name, json_file, image_root in entries(cfg, "REGISTER_COCO", FORM, (str, str, str)):
        order = tuple(classes) if classes else None if name == first else first
        part = CocoPart(name, json_file, image_root, order)
        description = {"json_file": json_file, "image_root": image_root}
        if is_registered("REGISTER_COCO", name, description):
            before = DatasetCatalog[name]
            if not isinstance(before, CocoPart) or before == part:
                continue
            DatasetCatalog.remove(name)  # an earlier run of this process has other classes
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, part)
        MetadataCatalog.get(name).set(evaluator_type="coco", **description)
        if cfg.MODEL.KEYPOINT_ON:
            set_keypoint_names(name, _read_json(name, json_file))


def check_dataset(
    name: str,
    num_classes: int | None = None,
    annotated: bool = True,
    masks: bool | None = False,
    classes: Sequence[str] | None = None,
    node: str = "ROI_HEADS",
    keypoints: int = 0,
) -> None:
    """Raises UsageError unless a data set is registered, complete and valid.

    Of a data set in another format than COCO's, only the registration is checked.

    Args:
        name: name in Detectron2's DatasetCatalog.
        num_classes: required number of categories; None: any.
        annotated: whether annotations are required; the test set of a contest has none.
        masks: whether each annotation must have a mask; None: if any has one.
        classes: class names of the run by label; None: those of the data set.
        node: the node of MODEL that has the number of classes.
        keypoints: number of keypoints of each annotation that has any; 0: not checked.
    """
    if name not in DatasetCatalog:
        raise UsageError(
            f"data set {name!r} is not registered: list it in DATASETS.REGISTER_COCO as {FORM}"
        )
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco":
        return
    json_file, image_root = metadata.json_file, metadata.image_root
    coco = _read_json(name, json_file)
    _check_annotations(name, json_file, coco, annotated, masks)
    if keypoints and (problem := wrong_keypoints(coco, keypoints)):
        raise UsageError(f"annotation file {json_file} of data set {name!r}: {problem}")
    if not isinstance(DatasetCatalog[name], CocoPart):
        _check_for_detectron2(name, json_file, coco)
    if num_classes is not None:
        check_num_classes(name, len(coco["categories"]), node, num_classes)
    _check_names(name, json_file, coco["categories"], classes)
    _check_images(name, image_root, [image["file_name"] for image in coco["images"]])


def _read_json(name: str, json_file: str) -> Any:
    try:
        return read_json(json_file)
    except UsageError as error:
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
        boxes = "must have a mask" in problem and first_problem(coco, False) is None
        hint = ": without masks, MODEL.MASK_ON False trains on the boxes" if boxes else ""
        raise UsageError(f"{what}: {problem}{hint}")


def _check_for_detectron2(name: str, json_file: str, coco: dict[str, Any]) -> None:
    """Raises UsageError for what Detectron2's own reader fails at, and ours does not."""
    what = f"annotation file {json_file} of data set {name!r}"
    if any(one.get("ignore") for one in coco.get("annotations") or ()):
        raise UsageError(
            f"{what} has annotations with ignore 1, at which Detectron2 fails: list it in "
            "DATASETS.REGISTER_COCO, which takes them as crowds"
        )
    with open(json_file, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
    if encoding != "utf-8":
        raise UsageError(
            f"{what} is {encoding}, at which Detectron2 fails: write it in utf-8 without a byte "
            "order mark, or list it in DATASETS.REGISTER_COCO"
        )


def _check_names(
    name: str, json_file: str, categories: list[dict], classes: Sequence[str] | None
) -> None:
    names = _understood(name, json_file, ordered_names, categories)
    if classes is None:
        return
    _understood(name, json_file, labels_by_name, classes, categories)
    moved = difference(classes, names)
    if moved and not isinstance(DatasetCatalog[name], CocoPart):
        label, wanted, found = moved
        raise UsageError(
            f"data set {name!r} has {found!r} as class {label} by ascending id, where the model "
            f"has {wanted!r}: list it in DATASETS.REGISTER_COCO, which goes by the names"
        )


def _understood(name: str, json_file: str, function: Callable[..., _Result], *args: Any) -> _Result:
    try:
        return function(*args)
    except UsageError as error:
        raise UsageError(f"annotation file {json_file} of data set {name!r}: {error}") from error


def _check_images(name: str, image_root: str, file_names: list[str]) -> None:
    what = f"image folder {image_root} of data set {name!r}"
    if not os.path.isdir(image_root):
        raise UsageError(f"{what} does not exist (working directory: {os.getcwd()})")
    missing = missing_files(image_root, file_names)
    if missing:
        raise UsageError(
            f"{what} lacks {len(missing)} of {len(file_names)} images, the first is {missing[0]}"
        )
