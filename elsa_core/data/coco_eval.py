"""COCO average precision, computed the same way in both frameworks."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from elsa_core.runtime.errors import UsageError

from .coco_rules import has_area
from .mask_rules import rle_of

# COCO's limit of detections per image, used even if a model gives fewer.
LEAST_LIMIT = 100
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_SIZES = {"s": "small", "m": "medium", "l": "large"}


class LimitedCOCOeval(COCOeval):
    """COCOeval with the same limit of detections for all average precisions.

    pycocotools computes AP at 100 detections per image and the other precisions at its largest
    limit.

    ``stats`` holds `METRICS`, then recalls at 1, 10 and ``limit`` detections, and at ``limit`` for
    small, medium and large objects; -1 without objects. Values are rounded to 12 digits, because
    pycocotools' precision of a single object is at most 1 - 2e-16.

    Args:
        truth, found: annotations and detections, with ids from 1.
        task: "bbox" or "segm".
        limit: detections per category and image.
        recalls: other numbers of detections for `recall`.
    """

    def __init__(
        self, truth: COCO, found: COCO, task: str, limit: int, recalls: Collection[int] = ()
    ) -> None:
        super().__init__(truth, found, task)
        self.limit = limit
        self.params.maxDets = sorted({1, 10, limit, *recalls})

    def summarize(self) -> None:
        sizes = list(_SIZES.values())
        precisions = [self.precision(), self.precision(iou=0.5), self.precision(iou=0.75)]
        precisions += [self.precision(area=size) for size in sizes]
        recalls = [self.recall(number) for number in (1, 10, self.limit)]
        recalls += [self.recall(self.limit, size) for size in sizes]
        self.stats = np.array(precisions + recalls)

    def precision(
        self, iou: float | None = None, area: str = "all", category: int | None = None
    ) -> float:
        """Return the average precision at the limit, 0..1.

        Args:
            iou: threshold; None for the mean of all.
            area: "all", "small", "medium" or "large".
            category: index of a category; None for the mean of all.
        """
        values = self.eval["precision"][..., self._area(area), self._limit(self.limit)]
        if iou is not None:
            values = values[np.isclose(self.params.iouThrs, iou)]
        return _mean(values if category is None else values[..., category])

    def recall(self, number: int, area: str = "all", category: int | None = None) -> float:
        """Return the average recall of the first ``number`` detections of an image, 0..1."""
        values = self.eval["recall"][..., self._area(area), self._limit(number)]
        return _mean(values if category is None else values[..., category])

    def curve(self, iou: float, category: int) -> np.ndarray | None:
        """Return precision [R] at the recalls ``params.recThrs``, 0..1, or None without objects."""
        at = np.isclose(self.params.iouThrs, iou)
        values = self.eval["precision"][at, :, category, self._area("all"), self._limit(self.limit)]
        return values[0] if values[0, 0] > -1 else None

    def __str__(self) -> str:
        """Return the lines that pycocotools prints."""
        iou = f"{self.params.iouThrs[0]:0.2f}:{self.params.iouThrs[-1]:0.2f}"
        areas = ["all"] * 3 + list(_SIZES.values())
        lines = [("Precision", "(AP)", iou, area, self.limit) for area in areas]
        lines[1:3] = [("Precision", "(AP)", one, "all", self.limit) for one in ("0.50", "0.75")]
        counts = [1, 10] + [self.limit] * 4
        lines += [
            ("Recall", "(AR)", iou, area, number)
            for area, number in zip(areas, counts, strict=True)
        ]
        return "\n".join(
            f" Average {kind:<10} {short} @[ IoU={at:<9} | area={area:>6s} | "
            f"maxDets={number:>3d} ] = {value:0.3f}"
            for (kind, short, at, area, number), value in zip(lines, self.stats, strict=True)
        )

    def _area(self, name: str) -> int:
        return self.params.areaRngLbl.index(name)

    def _limit(self, number: int) -> int:
        return list(self.params.maxDets).index(number)


def evaluate_detections(
    coco: dict[str, Any],
    labels: Mapping[Any, int],
    detections: Sequence[dict[str, Any]],
    task: str,
    limit: int = LEAST_LIMIT,
    *,
    image_ids: Collection[Any] | None = None,
    iou_thresholds: Sequence[float] | None = None,
    recalls: Collection[int] = (),
) -> LimitedCOCOeval:
    """Evaluate detections by average precision; categories are in the order of the labels.

    Objects that no detection can match are not counted: boxes without area and, for "segm", masks
    without pixels.

    Args:
        coco: content of a file, as `coco.load_coco` returns it.
        labels: {category id: label of the model}; other categories are ignored.
        detections: COCO results with the label as "category_id", and with "bbox" [x, y, width,
            height] or, for "segm", an RLE as "segmentation". Labels without a category in the file
            are ignored.
        task: "bbox" or "segm".
        limit: detections per category and image.
        image_ids: images to evaluate; None for all.
        iou_thresholds: None for 0.5, 0.55, ..., 0.95.
        recalls: numbers of detections for `LimitedCOCOeval.recall`, besides 1, 10 and the limit.

    Raises:
        UsageError: a detection is on an image that is not in the file.
    """
    numbers = {image["id"]: number for number, image in enumerate(coco["images"], start=1)}
    if unknown := [one["image_id"] for one in detections if one["image_id"] not in numbers]:
        raise UsageError(f"detections are on image {unknown[0]!r}, which is not in the file")
    truth = [
        {**one, "image_id": numbers[one["image_id"]], "category_id": labels[one["category_id"]] + 1}
        for one in coco.get("annotations") or []
        if one["category_id"] in labels and has_area(one["bbox"])
    ]
    found = [
        {**one, "image_id": numbers[one["image_id"]], "category_id": one["category_id"] + 1}
        for one in detections
    ]
    if task == "segm":
        sizes = [(image["width"], image["height"]) for image in coco["images"]]
        for one in truth:
            one["segmentation"] = rle_of(one["segmentation"], *sizes[one["image_id"] - 1])
        # One by one: pycocotools fails for a list of more than 255 masks.
        truth = [one for one in truth if pycocotools.mask.area(one["segmentation"])]
        areas = [pycocotools.mask.area(one["segmentation"]) for one in found]
    else:
        areas = [one["bbox"][2] * one["bbox"][3] for one in found]
    for one, area in zip(found, areas, strict=True):
        one.update(area=float(area), iscrowd=0)
    categories = range(1, max(labels.values(), default=-1) + 2)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = LimitedCOCOeval(
            _indexed(coco["images"], categories, truth),
            _indexed(coco["images"], categories, found),
            task,
            limit,
            recalls,
        )
        if image_ids is not None:
            evaluation.params.imgIds = [numbers[one] for one in image_ids]
        if iou_thresholds is not None:
            evaluation.params.iouThrs = np.asarray(iou_thresholds, dtype=float)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def limit_warning(coco: dict[str, Any], limit: int, key: str) -> str | None:
    """Return a warning if images have more objects than a model may detect, or None.

    Args:
        key: setting that holds the limit.
    """
    objects = (one for one in coco.get("annotations") or [] if has_area(one["bbox"]))
    counts = Counter(one["image_id"] for one in objects if not one["iscrowd"])
    over = [number for number in counts.values() if number > limit]
    if not over:
        return None
    return (
        f"{len(over)} of {len(coco['images'])} images have more than the {limit} objects that "
        f"{key} lets the model detect, up to {max(over)}: what is not detected caps every score"
    )


def unseen_warning(coco: dict[str, Any], seen: Collection[Any]) -> str | None:
    """Return a warning if images were not evaluated, or None."""
    unseen = {image["id"] for image in coco["images"]} - set(seen)
    if not unseen:
        return None
    return (
        f"{len(unseen)} of the annotation file's {len(coco['images'])} images were not evaluated: "
        "their objects count as not detected"
    )


def _indexed(
    images: list[dict[str, Any]], categories: range, annotations: list[dict[str, Any]]
) -> COCO:
    """Index annotations for pycocotools, with ids from 1: there, 0 means no match."""
    for number, one in enumerate(annotations, start=1):
        one["id"] = number
    index = COCO()
    index.dataset = {
        "images": [{**one, "id": number} for number, one in enumerate(images, start=1)],
        "categories": [{"id": number} for number in categories],
        "annotations": annotations,
    }
    index.createIndex()
    return index


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return round(float(values.mean()), 12) if values.size else -1.0
