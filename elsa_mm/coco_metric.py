"""COCO's metrics in MMDetection, for every file that the checker accepts.

Configs name it by its place, because it needs MMDetection:
`dict(type="elsa_mm.coco_metric.CocoMetric", ann_file=..., metric=["bbox", "segm"])`.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric as MMDetectionMetric
from mmengine.fileio import get_local_path
from mmengine.logging import MMLogger
from terminaltables import AsciiTable

from elsa_core.data.coco import load_coco
from elsa_core.data.coco_eval import (
    LEAST_LIMIT,
    LimitedCOCOeval,
    evaluate_detections,
    limit_warning,
    unseen_warning,
)
from elsa_core.runtime.errors import UsageError

from .checkpoint import ATOMIC_PREFIX

_OWN = ("bbox", "segm")
_PRECISIONS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
_AREAS = {"s": "small", "m": "medium", "l": "large"}


class CheckedCOCO(COCO):
    """MMDetection's index of a file, normalised by `elsa_core.data.coco.load_coco`.

    For data sets: `COCOAPI = CheckedCOCO`.

    Args:
        masks: whether each annotation must have a mask.
        name: of the file in messages, where `annotation_file` is a copy.

    Raises UsageError for a file in which the checker would find errors.
    """

    def __init__(
        self, annotation_file: str | None = None, masks: bool = False, name: str | None = None
    ) -> None:
        super().__init__()
        if annotation_file is None:
            return
        try:
            self.dataset = load_coco(annotation_file, masks, name)
        except UsageError as error:
            raise UsageError(f"annotation file {error}") from error
        with contextlib.redirect_stdout(io.StringIO()):
            self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


class CocoMetric(MMDetectionMetric):
    """CocoMetric with a correct mAP, mAP_50, mAP_75, mAP_s, mAP_m and mAP_l for every valid file.

    All six count the same detections of an image: all that the model returns, and at least COCO's
    100. They are not rounded to three digits, and 0 for a model that detects nothing. Categories
    are matched to the model's classes by name.

    Args:
        ann_file, options: MMDetection's. With two metrics, `classwise` tells their keys apart.
        max_dets: the model's detections per image, for the warning about images with more objects;
            our tools take it from `model.test_cfg`. None: as many as an image has.

    Raises UsageError for a file in which the checker would find errors.
    """

    _coco_api: Any

    def __init__(
        self,
        ann_file: str | None = None,
        *args: Any,
        max_dets: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(None, *args, **options)
        self.max_dets = max_dets
        if ann_file is not None:
            with get_local_path(ann_file, backend_args=self.backend_args) as path:
                self._coco_api = CheckedCOCO(path, self._masks, ann_file)
            if not self.format_only and "annotations" not in self._coco_api.dataset:
                raise UsageError(
                    f"annotation file {ann_file} has no annotations to evaluate with: format_only "
                    "with outfile_prefix writes the detections instead"
                )

    @property
    def _masks(self) -> bool:
        return "segm" in self.metrics and not self.format_only

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics, 0..1, or -1 where there are no objects, from what `process` has kept."""
        logger = MMLogger.get_current_instance()
        truths, predictions = zip(*results, strict=True)
        if self._coco_api is None:
            with tempfile.TemporaryDirectory() as folder:
                path = self.gt_to_coco_json(truths, os.path.join(folder, "truth"))
                self._coco_api = CheckedCOCO(path, self._masks)
        coco, classes = self._coco_api.dataset, self.dataset_meta["classes"]
        ids = {one["name"]: one["id"] for one in coco["categories"]}
        self.cat_ids = [ids.get(name) for name in classes]
        labels = {ids[name]: label for label, name in enumerate(classes) if name in ids}
        metrics = dict(self._others(results))
        if self.format_only:
            return metrics
        if self.outfile_prefix is not None:
            self.results2json(predictions, self.outfile_prefix)
        most = max(len(one["labels"]) for one in predictions)
        self._warn(coco, {one["img_id"] for one in predictions}, most, logger)
        limit = max(LEAST_LIMIT, self.max_dets or 0, most)
        for task in [one for one in self.metrics if one in _OWN]:
            logger.info(f"Evaluating {task}...")
            evaluation = evaluate_detections(
                coco,
                labels,
                _detections(predictions, task),
                task,
                limit,
                iou_thresholds=self.iou_thrs,
                recalls=self.proposal_nums,
            )
            logger.info(f"{task} at {limit} detections:\n{evaluation}")
            metrics.update(self._named(evaluation, task))
            if self.classwise:
                metrics.update(_by_class(evaluation, classes, task, self.metrics, logger))
        return metrics

    def results2json(
        self, results: Sequence[dict[str, Any]], outfile_prefix: str
    ) -> dict[str, str]:
        """Writes the results, completely or not at all; returns a file for each kind of result."""
        prefix = "" if "://" in outfile_prefix else ATOMIC_PREFIX
        files = super().results2json(results, prefix + outfile_prefix)
        return {kind: file.removeprefix(ATOMIC_PREFIX) for kind, file in files.items()}

    def _others(self, results: list) -> dict[str, float]:
        """MMDetection's own metrics of proposals, and its files for a test server."""
        own = self.metrics
        self.metrics = [one for one in own if one not in _OWN]
        try:
            if self.metrics or self.format_only:
                return super().compute_metrics(results)
            return {}
        finally:
            self.metrics = own

    def _warn(self, coco: dict, seen: set, most: int, logger: MMLogger) -> None:
        cap, key = self.max_dets, "model.test_cfg"
        if cap is None and most >= LEAST_LIMIT:  # then that may be the model's limit
            cap, key = most, "the model's limit (the most detections of an image)"
        warnings = [unseen_warning(coco, seen), cap and limit_warning(coco, cap, key)]
        for warning in filter(None, warnings):
            logger.warning(warning)

    def _named(self, evaluation: LimitedCOCOeval, task: str) -> dict[str, float]:
        values = dict(zip(_PRECISIONS, map(float, evaluation.stats), strict=False))
        for number in evaluation.params.maxDets:
            values[f"AR@{number}"] = evaluation.recall(number)
            for letter, area in _AREAS.items():
                values[f"AR_{letter}@{number}"] = evaluation.recall(number, area)
        items = self.metric_items or _PRECISIONS
        if unknown := [item for item in items if item not in values]:
            raise UsageError(f"metric_items must be among {', '.join(values)}, got {unknown[0]}")
        return {f"{task}_{item}": values[item] for item in items}


def _detections(predictions: Sequence[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """COCO's results, with labels in place of category ids."""
    found = []
    for one in predictions:
        if task == "segm" and "masks" not in one:
            raise UsageError("metric segm needs a model with masks, got boxes only")
        scores = one.get("mask_scores", one["scores"]) if task == "segm" else one["scores"]
        boxes = one["bboxes"].astype("float64").tolist()
        for place, (left, top, right, bottom) in enumerate(boxes):
            found.append(
                {
                    "image_id": one["img_id"],
                    "category_id": int(one["labels"][place]),
                    "score": float(scores[place]),
                    "bbox": [left, top, right - left, bottom - top],
                }
            )
            if task == "segm":
                found[-1]["segmentation"] = one["masks"][place]
    return found


def _by_class(
    evaluation: LimitedCOCOeval,
    classes: Sequence[str],
    task: str,
    tasks: Sequence[str],
    logger: MMLogger,
) -> dict[str, float]:
    """The average precision of each class, which is also logged as a table."""
    columns: dict[str, dict[str, Any]] = {
        "mAP": {},
        "mAP_50": {"iou": 0.5},
        "mAP_75": {"iou": 0.75},
        **{f"mAP_{letter}": {"area": area} for letter, area in _AREAS.items()},
    }
    rows = [["category", *columns]]
    values = {}
    prefix = f"{task}_" if len(set(tasks) & set(_OWN)) > 1 else ""
    for label in range(len(evaluation.params.catIds)):
        numbers = [evaluation.precision(category=label, **which) for which in columns.values()]
        rows.append([classes[label], *(f"{n:.3f}" if n >= 0 else "nan" for n in numbers)])
        values[f"{prefix}{classes[label]}_precision"] = numbers[0]
    logger.info("\n" + AsciiTable(rows).table)
    return values
