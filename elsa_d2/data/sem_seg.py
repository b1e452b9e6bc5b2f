"""Data sets of images and label maps: registration, reading, and checks before a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from elsa_core.data.images import ENDINGS
from elsa_core.data.label_maps import IGNORE, only_none, pair_files
from elsa_core.runtime.errors import UsageError

from .registration import check_num_classes, entries, is_registered
from .safe_loading import read_pair

FILES_READ_BEFORE_A_RUN = 32
FORM = "[name, image folder, label map folder, class names or their file, reduce_zero_label]"


def register_sem_seg_datasets(cfg: CfgNode) -> None:
    """Registers the data sets that DATASETS.REGISTER_SEM_SEG lists.

    Label map SUB/X.png belongs to image SUB/X with any known suffix. Paths are relative to the
    working directory. Raises UsageError for entries of another form, for a file of class names that
    cannot be read, and for a name that is registered for another data set.
    """
    kinds = (str, str, str, (str, list, tuple), bool)
    for entry in entries(cfg, "REGISTER_SEM_SEG", FORM, kinds):
        name, images, labels, classes, reduce_zero_label = entry
        description = {
            "image_root": images,
            "sem_seg_root": labels,
            "stuff_classes": _class_names(name, classes),
            "reduce_zero_label": reduce_zero_label,
        }
        if not is_registered("REGISTER_SEM_SEG", name, description):
            DatasetCatalog.register(name, partial(_load, images, labels, reduce_zero_label))
            MetadataCatalog.get(name).set(
                evaluator_type="sem_seg", ignore_label=IGNORE, **description
            )


def _class_names(name: str, classes: str | Sequence[str]) -> list[str]:
    if not isinstance(classes, str):
        return [str(one) for one in classes]
    try:
        with open(classes, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"file of class names {classes} of data set {name!r} cannot be read: {error}"
        ) from error


def _load(images: str, labels: str, reduce_zero_label: bool) -> list[dict[str, Any]]:
    return [
        {"file_name": image, "sem_seg_file_name": map_, "reduce_zero_label": reduce_zero_label}
        for image, map_ in pair_files(images, labels)
    ]


def check_sem_seg_dataset(name: str, num_classes: int, image_format: str = "RGB") -> None:
    """Raises UsageError unless a registered data set exists, matches, and a sample can be read.

    Every image must have a label map, and every label map an image. At most 32 are read, spread
    over the data set, and more only if those have no value but 0 and 255.

    Args:
        name: name in Detectron2's DatasetCatalog.
        num_classes: required number of classes.
        image_format: of INPUT.FORMAT.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "sem_seg":
        raise UsageError(f"data set {name!r} has no label maps, which a SemanticSegmentor needs")
    check_num_classes(name, len(metadata.stuff_classes), "SEM_SEG_HEAD", num_classes)
    for what, folder in (("image", metadata.image_root), ("label map", metadata.sem_seg_root)):
        if not os.path.isdir(folder):
            raise UsageError(
                f"{what} folder {folder} of data set {name!r} does not exist "
                f"(working directory: {os.getcwd()}){_how_to_make(folder)}"
            )
    pairs = pair_files(metadata.image_root, metadata.sem_seg_root)
    if not pairs:
        raise UsageError(
            f"image folder {metadata.image_root} of data set {name!r} has no images, which end in "
            f"{', '.join(ENDINGS)}"
        )
    records = DatasetCatalog.get(name)
    if len(records) < len(pairs):  # of Detectron2's own reader, which takes one ending
        known = {os.path.normpath(record["file_name"]) for record in records}
        left_out = [image for image, _ in pairs if os.path.normpath(image) not in known]
        raise UsageError(
            f"data set {name!r} leaves out {len(left_out)} of {len(pairs)} images, the first is "
            f"{left_out[0]}: list it in DATASETS.REGISTER_SEM_SEG, which takes all endings"
        )
    for record in records[:: max(1, -(-len(records) // FILES_READ_BEFORE_A_RUN))]:
        read_pair(record, image_format, num_classes)
    if num_classes > 1:
        maps = (record["sem_seg_file_name"] for record in records)
        if problem := only_none(maps, metadata.get("reduce_zero_label", False)):
            raise UsageError(f"the label maps in {metadata.sem_seg_root} {problem}")


def _how_to_make(folder: str) -> str:
    """A hint for Detectron2's name of ADE20K, which reads a folder that the download lacks."""
    parent, part = os.path.split(folder)
    if os.path.basename(parent) != "annotations_detectron2":
        return ""
    return (
        ": Detectron2's datasets/prepare_ade20k_sem_seg.py makes it from annotations, which "
        "DATASETS.REGISTER_SEM_SEG can also name directly, with reduce_zero_label True"
    )
