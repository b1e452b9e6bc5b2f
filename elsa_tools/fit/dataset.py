"""A data set that both frameworks read: what `sources.prepare` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

INSTANCES, BOXES, SEMANTIC = "instances", "boxes", "semantic"
TASKS = (INSTANCES, BOXES, SEMANTIC)


@dataclass(frozen=True)
class Part:
    """Images for training or for validation.

    Args:
        images: folder that file names are relative to.
        annotations: file in COCO's format; None for label maps.
        maps: folder of label maps with the relative stems of the images; None without label maps.
        count: number of images.
    """

    images: Path
    annotations: Path | None
    maps: Path | None
    count: int


@dataclass(frozen=True)
class DataSet:
    """A checked data set with a part for training and one for validation.

    Args:
        task: "instances", "boxes" or "semantic".
        classes: names in the order of the model's labels; in COCO files, categories 1, 2, ...
        layout: one sentence about what was recognised.
        split: one sentence about the parts.
        reduce_zero_label: 0 in label maps means no class, and classes begin at 1.
        warnings: one sentence about each thing that was left out or that may be a mistake.
    """

    task: str
    classes: tuple[str, ...]
    train: Part
    val: Part
    layout: str
    split: str
    reduce_zero_label: bool = False
    warnings: tuple[str, ...] = ()
