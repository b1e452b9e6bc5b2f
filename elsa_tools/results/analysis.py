"""Results by class of one task, common to objects and label maps, and their form in JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Scores in percent; None where there is nothing to find.
Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Shape:
    """An object or a detection in an image.

    Args:
        label: index of its class.
        box: [x, y, width, height] in pixels.
        mask: COCO's compressed RLE, or None.
        score: of a detection, 0..1.
        wrong: an object that was missed, or a detection that matches no object of its class.
    """

    label: int
    box: Sequence[float]
    mask: dict[str, Any] | None
    score: float | None = None
    wrong: bool = False


@dataclass(frozen=True)
class ImageResult:
    """An image and its mistakes.

    Args:
        file_name: relative to the folder of images.
        severity: larger is worse; 0 without a mistake.
        text: the mistakes in half a sentence.
        drawn: returns what is there and what was found: lists of shapes, or label maps [H, W] whose
            last label stands for no class.
    """

    file_name: str
    severity: float
    text: str
    drawn: Callable[[], tuple[list[Shape], list[Shape]] | tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class ClassResult:
    """``truths`` and ``found`` count objects and detections, or pixels."""

    name: str
    truths: int
    found: int
    scores: Scores


@dataclass(frozen=True)
class Confusion:
    """``matrix`` [N, N] counts what is of class row and was found as class column.

    Args:
        names: of rows and columns; for objects the last one is "background", whose row has
            detections that match no object and whose column has missed objects.
        unit: "objects" or "pixels".
        rule: sentence about what was counted.
    """

    names: tuple[str, ...]
    matrix: np.ndarray
    unit: str
    rule: str

    def confused(self, most: int) -> list[tuple[str, str, int]]:
        """Return the most frequent pairs (class, class that it was found as, count)."""
        wrong = self.matrix.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        places = [divmod(int(place), len(self.names)) for place in order]
        return [
            (self.names[row], self.names[column], int(wrong[row, column]))
            for row, column in places
            if wrong[row, column]
        ]


@dataclass(frozen=True)
class Analysis:
    """Results of one task.

    Args:
        task: "bbox", "segm" or "semantic".
        annotations: file or folder that the results were compared with.
        summary: scores over all classes; the first one is the task's.
        by_class: in the order of the classes.
        by_iou: AP by IoU threshold ("0.50"); empty for label maps.
        recalls: [R], in 0..1, of ``curves``.
        curves: precision [R] in 0..1 by class that has objects, at the IoU of ``confusion``.
        images: worst first; among those without a mistake the one with fewest objects first.
        notes: sentences about the rules that were followed.
    """

    task: str
    annotations: str
    summary: Scores
    by_class: tuple[ClassResult, ...]
    by_iou: Scores
    recalls: np.ndarray
    curves: Mapping[str, np.ndarray]
    confusion: Confusion
    images: tuple[ImageResult, ...]
    notes: tuple[str, ...]

    @property
    def metric(self) -> str:
        """Name of the task's score: AP or mIoU."""
        return next(iter(self.summary))

    def record(self) -> dict[str, Any]:
        """Return the content of a JSON file; scores are in percent, null without objects."""
        return {
            "task": self.task,
            "annotations": self.annotations,
            "summary": dict(self.summary),
            "by_class": [
                {"class": one.name, "truths": one.truths, "found": one.found, **one.scores}
                for one in self.by_class
            ],
            "by_iou": dict(self.by_iou),
            "curves": {
                "recall": self.recalls.tolist(),
                "precision": {name: curve.tolist() for name, curve in self.curves.items()},
            },
            "confusion": {
                "names": list(self.confusion.names),
                "unit": self.confusion.unit,
                "rule": self.confusion.rule,
                "matrix": self.confusion.matrix.tolist(),
            },
            "images": [
                {"file_name": one.file_name, "severity": one.severity, "mistakes": one.text}
                for one in self.images
            ],
            "notes": list(self.notes),
        }
