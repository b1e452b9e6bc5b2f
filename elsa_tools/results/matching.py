"""Match detections and objects one to one, as COCO's evaluation does, at one IoU and one score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask

from elsa_core.data.coco_eval import LimitedCOCOeval


@dataclass
class Match:
    """The objects and detections of an image, by ids of the evaluation.

    Args:
        pairs: (object, detection) of one class, as COCO's evaluation matches them.
        confused: pairs of two classes.
        missed: objects that no detection matches.
        extra: detections that match no object.
        ignored: crowds, and objects that COCO's evaluation does not count.
    """

    pairs: list[tuple[int, int]] = field(default_factory=list)
    confused: list[tuple[int, int]] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    extra: list[int] = field(default_factory=list)
    ignored: list[int] = field(default_factory=list)


def best_score(evaluation: LimitedCOCOeval, iou: float) -> tuple[float, float]:
    """Return the score threshold of the best F1 over all classes, and that F1, 0..1.

    Detections with at least that score count. Of equal F1 the highest threshold is returned; 0
    where no detection matches an object.
    """
    scores: list[float] = []
    right: list[bool] = []
    objects = 0
    for one, at in _evaluated(evaluation, iou):
        objects += int(np.sum(np.asarray(one["gtIgnore"]) == 0))
        counts = ~one["dtIgnore"][at].astype(bool)
        scores += np.asarray(one["dtScores"])[counts].tolist()
        right += (one["dtMatches"][at] > 0)[counts].tolist()
    if not any(right):
        return 0.0, 0.0
    order = np.argsort(-np.array(scores), kind="stable")
    sorted_scores, matched = np.array(scores)[order], np.cumsum(np.array(right)[order])
    last = np.append(np.diff(sorted_scores) != 0, True)  # equal scores count together
    f1 = np.where(last, 2 * matched / (np.arange(1, len(order) + 1) + objects), -1)
    best = int(f1.argmax())
    return float(sorted_scores[best]), float(f1[best])


def match_images(evaluation: LimitedCOCOeval, iou: float, score: float) -> dict[int, Match]:
    """Return the match of each image by its number in the evaluation.

    Detections of one class match as in COCO's evaluation: in the order of their scores, each the
    free object of the largest IoU. Those that match a crowd of their class are left out. Then
    objects and detections that are left match across classes, the pair of the largest IoU first.

    Args:
        iou: one of the evaluation's thresholds.
        score: least score of a detection.
    """
    found: dict[int, Match] = defaultdict(Match)
    for one, at in _evaluated(evaluation, iou):
        image = found[one["image_id"]]
        matched = set()
        for place, number in enumerate(one["dtIds"]):
            if one["dtScores"][place] < score:
                continue
            truth = int(one["dtMatches"][at, place])
            matched.add(truth)
            if one["dtIgnore"][at, place]:
                continue
            if truth:
                image.pairs.append((truth, number))
            else:
                image.extra.append(number)
        for number, ignore in zip(one["gtIds"], one["gtIgnore"], strict=True):
            if ignore:
                image.ignored.append(number)
            elif number not in matched:
                image.missed.append(number)
    for image in found.values():
        _confuse(evaluation, image, iou)
    return dict(found)


def _evaluated(evaluation: LimitedCOCOeval, iou: float) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each image and class that has objects or detections, and the place of the IoU."""
    at = int(np.flatnonzero(np.isclose(evaluation.params.iouThrs, iou))[0])
    everything = evaluation.params.areaRng[0]
    for one in evaluation.evalImgs:
        if one is not None and one["aRng"] == everything:
            yield one, at


def _confuse(evaluation: LimitedCOCOeval, image: Match, iou: float) -> None:
    """Match what is left across classes."""
    if not image.missed or not image.extra:
        return
    key = "segmentation" if evaluation.params.iouType == "segm" else "bbox"
    truths = [evaluation.cocoGt.anns[number][key] for number in image.missed]
    found = [evaluation.cocoDt.anns[number][key] for number in image.extra]
    ious = pycocotools.mask.iou(found, truths, [0] * len(truths))  # [extra, missed]
    pairs = np.argwhere(ious >= iou)
    order = np.argsort(-ious[tuple(pairs.T)], kind="stable")
    taken: tuple[set[int], set[int]] = set(), set()
    for row, column in pairs[order].tolist():
        if row not in taken[0] and column not in taken[1]:
            taken[0].add(row)
            taken[1].add(column)
            image.confused.append((image.missed[column], image.extra[row]))
    image.extra = [one for place, one in enumerate(image.extra) if place not in taken[0]]
    image.missed = [one for place, one in enumerate(image.missed) if place not in taken[1]]
