"""What a report tells about a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Rule:
    """A choice of `elsa fit`: what was chosen, its value, and why, in a sentence."""

    what: str
    value: str
    why: str


@dataclass(frozen=True)
class Run:
    """A training, for `report.write_report`.

    Args:
        title: heading of the report.
        framework: such as "Detectron2 0.7".
        model: such as "Mask R-CNN with ELSA-Swin-T".
        task: of `fit`: "instances", "boxes" or "semantic".
        data: sentences about the data set: what was recognised, how it was split.
        rules: the choices of `fit`.
        history: a row for each iteration that was logged or evaluated, with the key "iteration"
            and any of "lr", losses whose keys begin with "loss", and metrics in percent as
            "val/NAME" and, of the averaged weights, "val_ema/NAME", such as "val/box AP".
        metric: NAME that chose the best checkpoint.
        seconds: of the training, evaluations included.
        images_per_second: of the training; None if unknown.
        image_seconds: that the evaluation of an image took; None if unknown.
        machine: sentence about processors and memory.
        commands: {what it does: command}, in the order of the report.
        config, checkpoint: files of the model.
        images: folder of the validation images.
        train: COCO file of the training part, for the number of objects; None for label maps.
    """

    title: str
    framework: str
    model: str
    task: str
    data: Sequence[str]
    rules: Sequence[Rule]
    history: Sequence[Mapping[str, float]]
    metric: str
    seconds: float
    images_per_second: float | None
    image_seconds: float | None
    machine: str
    commands: Mapping[str, str]
    config: Path
    checkpoint: Path
    images: Path
    train: Path | None = field(default=None)
