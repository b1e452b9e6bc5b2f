"""Data sets of images and label maps: registered from the config, read, checked before a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg
from detectron2.data.detection_utils import read_image as read_any_image
from PIL import Image

from elsa_core.errors import DamagedFileError, UsageError
from elsa_data.images import reason

IGNORE = 255
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")
FILES_READ_BEFORE_A_RUN = 32
FORM = "[name, image folder, label map folder, class names or their file, reduce_zero_label]"


def register_sem_seg_datasets(cfg: CfgNode) -> None:
    """Registers the data sets that DATASETS.REGISTER_SEM_SEG lists.

    Label map X.png belongs to image X.jpg (or .jpeg, .png). Relative paths start at the working
    directory. Raises UsageError for entries of another form, for a file of class names that cannot
    be read, and for a name that stands for another data set already.
    """
    for entry in cfg.DATASETS.REGISTER_SEM_SEG:
        kinds = (str, str, str, (str, list, tuple), bool)
        if (
            not isinstance(entry, (list, tuple))
            or len(entry) != len(kinds)
            or not all(map(isinstance, entry, kinds))
        ):
            raise UsageError(f"DATASETS.REGISTER_SEM_SEG must be a list of {FORM}, got {entry!r}")
        name, images, labels, classes, reduce_zero_label = entry
        description = {
            "image_root": images,
            "sem_seg_root": labels,
            "stuff_classes": _class_names(name, classes),
            "reduce_zero_label": reduce_zero_label,
        }
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, lambda entry=entry: _load(entry[1], entry[2], entry[4]))
            MetadataCatalog.get(name).set(
                evaluator_type="sem_seg", ignore_label=IGNORE, **description
            )
            continue
        known = MetadataCatalog.get(name)
        if any(known.get(key) != value for key, value in description.items()):
            raise UsageError(
                f"DATASETS.REGISTER_SEM_SEG names {name!r}, which is registered as another data set"
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
    records = load_sem_seg(labels, images, "png", _image_extension(images))
    return [{**record, "reduce_zero_label": reduce_zero_label} for record in records]


def _image_extension(folder: str) -> str:
    """Of the first image in it, without the point."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(IMAGE_EXTENSIONS))
    return os.path.splitext(names[0])[1][1:] if names else "jpg"


def read_image(path: str, image_format: str) -> np.ndarray:
    """[H, W, 3] in 0..255. Raises DamagedFileError, which names the file, where it is not whole."""
    try:
        return read_any_image(path, image_format)
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: PIL's word for a broken PNG
        raise DamagedFileError(f"image {path} cannot be read: {reason(error, path)}") from error


def read_labels(path: str, num_classes: int, reduce_zero_label: bool = False) -> np.ndarray:
    """A label map [H, W]: 0..num_classes - 1, or 255 for no class.

    Args:
        path: an image of one channel; with a palette, its indices are the labels.
        num_classes: at most 255.
        reduce_zero_label: in the file, 0 stands for no class and the classes begin at 1.

    Raises:
        DamagedFileError: for a file that is no such image, and for other labels.
    """
    try:
        with Image.open(path) as file:
            labels = np.array(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise DamagedFileError(f"label map {path} cannot be read: {reason(error, path)}") from error
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise DamagedFileError(
            f"a label map must have one channel of whole numbers, got {path} of shape "
            f"{labels.shape} and type {labels.dtype}"
        )
    first = int(reduce_zero_label)
    wrong = labels[(labels >= num_classes + first) & (labels != IGNORE)]
    if wrong.size:
        raise DamagedFileError(
            f"labels must be {first}..{num_classes + first - 1} for {num_classes} classes, or "
            f"{'0 or ' * first}{IGNORE} for none, got {wrong.max()} in {path}"
        )
    if reduce_zero_label:
        labels = np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)
    return labels.astype(np.uint8)


def check_sem_seg_dataset(name: str, num_classes: int) -> None:
    """Raises UsageError unless a registered data set is there, fits, and some of it can be read.

    Every image must have a label map. At most 32 of them are read, spread over the whole.

    Args:
        name: in Detectron2's DatasetCatalog.
        num_classes: how many classes it must have.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "sem_seg":
        raise UsageError(f"data set {name!r} has no label maps, which a SemanticSegmentor needs")
    if len(metadata.stuff_classes) != num_classes:
        raise UsageError(
            f"data set {name!r} has {len(metadata.stuff_classes)} classes, "
            f"but MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}"
        )
    for what, folder in (("image", metadata.image_root), ("label map", metadata.sem_seg_root)):
        if not os.path.isdir(folder):
            raise UsageError(
                f"{what} folder {folder} of data set {name!r} does not exist "
                f"(working directory: {os.getcwd()}){_how_to_make(folder)}"
            )
    files = [f for f in os.listdir(metadata.image_root) if f.endswith(IMAGE_EXTENSIONS)]
    stems = {os.path.splitext(file)[0] for file in files}
    if not stems:
        raise UsageError(f"image folder {metadata.image_root} of data set {name!r} has no images")
    missing = stems - {os.path.splitext(f)[0] for f in os.listdir(metadata.sem_seg_root)}
    if missing:
        raise UsageError(
            f"label map folder {metadata.sem_seg_root} of data set {name!r} lacks "
            f"{len(missing)} of {len(stems)} label maps, the first is {min(missing)}.png"
        )
    records = DatasetCatalog.get(name)
    for record in records[:: max(1, -(-len(records) // FILES_READ_BEFORE_A_RUN))]:
        read_pair(record, "RGB", num_classes)


def read_pair(
    record: dict[str, Any], image_format: str, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Image [H, W, 3] and label map [H, W] of a record. Raises DamagedFileError for broken ones."""
    image = read_image(record["file_name"], image_format)
    path = record["sem_seg_file_name"]
    labels = read_labels(path, num_classes, record.get("reduce_zero_label", False))
    if image.shape[:2] != labels.shape:
        raise DamagedFileError(
            f"a label map must be as large as its image, got {path} of {labels.shape} pixels for "
            f"{image.shape[:2]}"
        )
    return image, labels


def _how_to_make(folder: str) -> str:
    """Detectron2's own name for ADE20K reads another folder than the data set brings."""
    parent, part = os.path.split(folder)
    if os.path.basename(parent) != "annotations_detectron2":
        return ""
    return (
        ": Detectron2's datasets/prepare_ade20k_sem_seg.py makes it from annotations, which "
        "DATASETS.REGISTER_SEM_SEG can also name directly, with reduce_zero_label True"
    )
