"""Results by class of boxes and masks, from a results file of either framework."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from elsa_core.data.classes import labels_by_name, ordered_names
from elsa_core.data.coco import load_coco
from elsa_core.data.coco_eval import LEAST_LIMIT, METRICS, LimitedCOCOeval, evaluate_detections
from elsa_core.runtime.errors import UsageError

from .analysis import Analysis, ClassResult, Confusion, ImageResult, Shape
from .matching import Match, best_score, match_images
from .read import check_results

BACKGROUND = "background"
_WHICH: dict[str, dict[str, Any]] = {
    "AP": {},
    "AP50": {"iou": 0.5},
    "AP75": {"iou": 0.75},
    "APs": {"area": "small"},
    "APm": {"area": "medium"},
    "APl": {"area": "large"},
}
assert tuple(_WHICH) == METRICS


def analyse_detections(
    annotations: str,
    entries: Sequence[dict[str, Any]],
    task: str,
    *,
    classes: Sequence[str] | None = None,
    iou: float = 0.5,
    score: float | None = None,
) -> Analysis:
    """Analyse detections, with the scores of `evaluate_detections`, which both frameworks show.

    Args:
        annotations: COCO file.
        entries: as `read.read_results` returns them; masks become compressed RLE in place.
        task: "bbox" or "segm".
        classes: those that the model knows; None for all categories. Others are not evaluated.
        iou: threshold of the curves, the confusion matrix and the mistakes.
        score: least score of a detection in the confusion matrix and the mistakes; None for that
            of the best F1.

    Raises:
        UsageError: for a file of annotations or detections with an error.
    """
    if not (score is None or math.isfinite(score)):
        raise UsageError(f"score must be a finite number, got {score}")
    coco = load_coco(annotations, masks=task == "segm")
    if "annotations" not in coco:
        raise UsageError(f"{annotations} has no annotations to evaluate with")
    names = list(classes or ordered_names(coco["categories"]))
    labels = labels_by_name(names, coco["categories"], others=True)
    check_results(entries, {one["id"]: one for one in coco["images"]}, labels, task)
    found = [{**one, "category_id": labels[one["category_id"]]} for one in entries]
    counts = Counter(one["image_id"] for one in entries)
    limit = max(LEAST_LIMIT, *counts.values(), 0)
    evaluation = evaluate_detections(coco, labels, found, task, limit)
    thresholds = evaluation.params.iouThrs.tolist()
    if not np.isclose(thresholds, iou).any():
        raise UsageError(f"iou must be 0.5, 0.55, ... or 0.95, got {iou:g}")
    if not any(one["iscrowd"] == 0 for one in evaluation.cocoGt.anns.values()):
        raise UsageError(f"{annotations} has no object of the classes to evaluate with")
    best, f1 = best_score(evaluation, iou)
    threshold = best if score is None else score
    matches = match_images(evaluation, iou, threshold)
    matrix = _confusion(evaluation, matches, len(names))
    curves = {name: evaluation.curve(iou, label) for label, name in enumerate(names)}
    reason = f"that of the best F1 ({100 * f1:.1f} %)" if f1 else "as none matches an object"
    chosen = f"{threshold:.3g}" + f", {reason}," * (score is None)
    rule = (
        f"Detections with a score of at least {chosen} are matched to objects at IoU {iou:g} or "
        "more: first those of one class, as COCO's evaluation does, then the rest across classes."
    )
    return Analysis(
        task=task,
        annotations=annotations,
        summary=_summary(evaluation),
        by_class=tuple(_by_class(evaluation, names, matrix)),
        by_iou={f"{at:.2f}": _percent(evaluation.precision(iou=at)) for at in thresholds},
        recalls=evaluation.params.recThrs,
        curves={name: curve for name, curve in curves.items() if curve is not None},
        confusion=Confusion((*names, BACKGROUND), matrix, "objects", rule),
        images=tuple(_images(coco["images"], evaluation, matches)),
        notes=tuple(_notes(evaluation, limit)),
    )


def _summary(evaluation: LimitedCOCOeval) -> dict[str, float | None]:
    scores = {name: evaluation.precision(**which) for name, which in _WHICH.items()}
    scores |= {f"AR@{number}": evaluation.recall(number) for number in evaluation.params.maxDets}
    for letter, area in zip("sml", ("small", "medium", "large"), strict=True):
        scores[f"AR{letter}"] = evaluation.recall(evaluation.limit, area)
    return {name: _percent(value) for name, value in scores.items()}


def _by_class(
    evaluation: LimitedCOCOeval, names: Sequence[str], matrix: np.ndarray
) -> list[ClassResult]:
    found = []
    for label, name in enumerate(names):
        scores = {
            key: _percent(evaluation.precision(category=label, **which))
            for key, which in _WHICH.items()
        }
        scores["AR"] = _percent(evaluation.recall(evaluation.limit, category=label))
        truths, detections = int(matrix[label].sum()), int(matrix[:, label].sum())
        right = 100 * int(matrix[label, label])
        scores["precision"] = right / detections if detections and truths else None
        scores["recall"] = right / truths if truths else None
        scores["F1"] = 2 * right / (truths + detections) if truths else None
        found.append(ClassResult(name, truths, detections, scores))
    return found


def _confusion(evaluation: LimitedCOCOeval, matches: dict[int, Match], classes: int) -> np.ndarray:
    truths, found = evaluation.cocoGt.anns, evaluation.cocoDt.anns
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for match in matches.values():
        pairs = [(truths[a]["category_id"], found[b]["category_id"]) for a, b in match.pairs]
        pairs += [(truths[a]["category_id"], found[b]["category_id"]) for a, b in match.confused]
        pairs += [(truths[a]["category_id"], 0) for a in match.missed]
        pairs += [(0, found[b]["category_id"]) for b in match.extra]
        for row, column in pairs:  # ids are labels plus 1: 0 - 1 is the last row or column
            matrix[row - 1, column - 1] += 1
    return matrix


def _images(
    images: Sequence[dict[str, Any]], evaluation: LimitedCOCOeval, matches: dict[int, Match]
) -> list[ImageResult]:
    """Return images by severity: 1 for each object not found, plus the scores of wrong detections.

    An object that was found as another class is both.
    """
    ranked = []
    for number, image in enumerate(images, start=1):
        match = matches.get(number, Match())
        missed = len(match.missed) + len(match.confused)
        wrong = [*match.extra, *(found for _, found in match.confused)]
        severity = missed + sum(evaluation.cocoDt.anns[one]["score"] for one in wrong)
        counts = {
            "as another class": len(match.confused),
            "missed": len(match.missed),
            "detections of nothing": len(match.extra),
        }
        text = f"found: {len(match.pairs)} of {missed + len(match.pairs)}"
        text += "".join(f"; {what}: {count}" for what, count in counts.items() if count)
        drawn = partial(_drawn, evaluation, match)
        result = ImageResult(image["file_name"], float(severity), text, drawn)
        ranked.append((-severity, len(match.pairs), number, result))
    return [result for *_, result in sorted(ranked, key=lambda one: one[:3])]


def _drawn(evaluation: LimitedCOCOeval, match: Match) -> tuple[list[Shape], list[Shape]]:
    def shape(one: dict[str, Any], wrong: bool) -> Shape:
        mask = one["segmentation"] if evaluation.params.iouType == "segm" else None
        return Shape(one["category_id"] - 1, one["bbox"], mask, one.get("score"), wrong)

    truths, found = evaluation.cocoGt.anns, evaluation.cocoDt.anns
    wrong = [one for one, _ in match.confused] + match.missed
    extra = [one for _, one in match.confused] + match.extra
    return (
        [shape(truths[one], False) for one, _ in match.pairs]
        + [shape(truths[one], True) for one in wrong],
        [shape(found[one], False) for _, one in match.pairs]
        + [shape(found[one], True) for one in extra],
    )


def _notes(evaluation: LimitedCOCOeval, limit: int) -> list[str]:
    notes = [
        "AP is COCO's: the mean over IoU 0.50 to 0.95 and over the classes that have objects.",
        "Small objects have less than 32 x 32 pixels, large ones more than 96 x 96.",
        f"Up to {limit} detections of an image count for each class.",
    ]
    ignored = sum(one["iscrowd"] for one in evaluation.cocoGt.anns.values())
    if ignored:
        notes.append(
            f"{ignored} crowds and ignored objects count neither as found nor as missed, nor do "
            "detections of their class on them."
        )
    return notes


def _percent(value: float) -> float | None:
    return None if value < 0 else round(100 * value, 10)
