"""Images to calibrate int8 models with, and how far such a model agrees with its float model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from elsa_core.runtime.errors import UsageError
from elsa_tools.predict.inputs import find_inputs, is_video, read_image
from elsa_tools.predict.paste import paste_masks
from elsa_tools.predict.runtime import prepare

from .record import Record

Arrays = dict[str, np.ndarray]
# A loaded model: inputs by name -> outputs by name.
Run = Callable[[Arrays], Arrays]
# Detections from this score must have a counterpart, which may score half of it.
CONFIDENT = 0.3


class Images:
    """Images of a folder, as a model takes them, one at a time. They are read when iterated.

    Args:
        folder: its images count, those in other folders inside it do not.
        record: of the model; says how images are resized.
        most: number of images to take, spread evenly over the sorted names.

    Raises UsageError for a folder without images.
    """

    def __init__(self, folder: str, record: Record, most: int) -> None:
        if most < 1:
            raise UsageError(f"the number of calibration images must be at least 1, got {most}")
        files = [file for file in find_inputs([folder]) if not is_video(file)]
        if not files:
            raise UsageError(f"no image found in {folder}")
        count = min(most, len(files))
        self.files: Sequence[str] = [files[index * len(files) // count] for index in range(count)]
        self.record = record

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Arrays]:
        for file in self.files:
            yield self.read(file)

    def read(self, file: str) -> Arrays:
        image = np.ascontiguousarray(prepare(self.record, read_image(file))[None])
        if self.record.task != "detection":
            return {"image": image}
        return {"image": image, "size": np.array([image.shape[2:]], np.int64)}


def summary(record: Record, outputs: Arrays) -> Any:
    """What `agreement` needs of a model's outputs for one image."""
    if record.task == "segmentation":
        return outputs["logits"].argmax(1).astype(np.uint16)
    if record.task == "features":
        return outputs
    rows = outputs["scores"] >= CONFIDENT / 2
    return {name: values[rows] for name, values in outputs.items()}


def agreement(record: Record, ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """How far two models agree on images, 0..1, from a `summary` of each image.

    - detection: mean overlap (IoU of the boxes or of the masks, the smaller one) of each detection
      of either model, from a score of 0.3, with the other's nearest one of the same class, from a
      score of 0.15; 0 where there is none;
    - segmentation: share of pixels with the same class;
    - features: 1 - relative distance of the maps that differ most.
    """
    pairs = list(zip(ours, theirs, strict=True))
    if record.task == "segmentation":
        return float(np.mean([(a == b).mean() for a, b in pairs]))
    if record.task == "features":
        distances = [[_distance(a[name], b[name]) for name in a] for a, b in pairs]
        return max(0.0, 1 - float(np.mean(distances, axis=0).max()))
    overlaps = [o for a, b in pairs for o in (*_overlaps(record, a, b), *_overlaps(record, b, a))]
    return float(np.mean(overlaps)) if overlaps else 1.0


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-12))


def _overlaps(record: Record, ours: Arrays, theirs: Arrays) -> np.ndarray:
    """Of each of our confident detections with theirs."""
    rows = ours["scores"] >= CONFIDENT
    ours = {name: values[rows] for name, values in ours.items()}
    if not len(ours["boxes"]) or not len(theirs["boxes"]):
        return np.zeros(len(ours["boxes"]))
    overlap = _box_iou(ours["boxes"], theirs["boxes"])
    overlap[ours["labels"][:, None] != theirs["labels"][None]] = 0
    nearest = overlap.argmax(1)
    best: np.ndarray = overlap.max(1)
    if record.masks == "logits":
        a, b = ours["boxes"], theirs["boxes"][nearest]
        # Masks are pasted into the common box, which suffices to count their pixels.
        corner = np.floor(np.minimum(a[:, :2], b[:, :2]))
        extent = np.ceil(np.maximum(a[:, 2:], b[:, 2:])) - corner
        size = (max(1, int(extent[:, 1].max())), max(1, int(extent[:, 0].max())))
        shift = np.tile(corner, 2)
        pasted = [
            paste_masks(masks, boxes - shift, size, record.mask_threshold)
            for masks, boxes in ((ours["masks"], a), (theirs["masks"][nearest], b))
        ]
        common, either = ((f(*pasted)).sum((1, 2)) for f in (np.logical_and, np.logical_or))
        best = np.where(best > 0, np.minimum(best, common / np.maximum(either, 1)), 0)
    return best


def _box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[N, 4] and [M, 4] -> [N, M]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (high - low).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1) for boxes in (a, b)]
    result: np.ndarray = common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-12)
    return result
