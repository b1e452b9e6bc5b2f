"""The class names of a run: those of the checkpoint it evaluates, or of its training part."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from elsa_core.data.classes import difference, ordered_names
from elsa_core.data.coco import read_json
from elsa_core.runtime.errors import UsageError
from elsa_d2.config import is_sem_seg


def class_kind(cfg: CfgNode) -> str:
    """The key of the class names in Detectron2's metadata."""
    return "stuff_classes" if is_sem_seg(cfg) else "thing_classes"


def classes_node(cfg: CfgNode) -> str:
    """The node of MODEL whose NUM_CLASSES the model uses."""
    if is_sem_seg(cfg):
        return "SEM_SEG_HEAD"
    return "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"


def number_of_classes(cfg: CfgNode) -> int:
    return cfg.MODEL[classes_node(cfg)].NUM_CLASSES


def class_names(name: str, kind: str = "thing_classes") -> list[str] | None:
    """Returns the class names of a data set by label; None if they are unknown or not readable.

    Args:
        name: name of the data set, which need not be registered.
        kind: as returned by `class_kind`.
    """
    if name not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    if metadata.get(kind):
        return list(metadata.get(kind))
    if kind != "thing_classes" or metadata.get("evaluator_type") != "coco":
        return None
    order = getattr(DatasetCatalog[name], "order", None)
    if isinstance(order, tuple):
        return list(order)
    try:
        return ordered_names(read_json(metadata.json_file)["categories"])
    except (UsageError, KeyError, TypeError):
        return None


def training_classes(cfg: CfgNode) -> list[str] | None:
    """Class names of the first of DATASETS.TRAIN, whose labels the other parts use."""
    return class_names(cfg.DATASETS.TRAIN[0], class_kind(cfg)) if cfg.DATASETS.TRAIN else None


def usable(cfg: CfgNode, names: Sequence[str] | None) -> Sequence[str] | None:
    """Returns the class names of a checkpoint, or None if the model has another number."""
    return names if names and len(names) == number_of_classes(cfg) else None


def check_names(
    cfg: CfgNode,
    names: Sequence[str] | None,
    where: str,
    others: Sequence[str] | None,
    elsewhere: str,
) -> None:
    """Raises UsageError for a label with two class names. None: nothing to compare.

    Args:
        where: source of ``names``, for the message.
        elsewhere: source of ``others``.
    """
    if not names or not others or len(names) != len(others):
        return
    if found := difference(names, others, spelling=is_sem_seg(cfg)):
        label, one, other = found
        raise UsageError(
            f"class {label} is {one!r} in {where} and {other!r} in {elsewhere}: they must have the "
            "same classes in the same order"
        )
