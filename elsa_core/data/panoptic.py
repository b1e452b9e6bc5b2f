"""Panoptic segmentation in COCO's format, and its quality (arXiv 1801.00868).

Each image has a PNG whose colours are numbers of segments, and a list of segments with their
categories. COCO's reference, `panopticapi`, is not on PyPI; this computes the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

VOID = 0  # the number of pixels without a segment


def to_ids(colours: np.ndarray) -> np.ndarray:
    """The numbers of segments [H, W], int32, in RGB colours [H, W, 3] of a PNG."""
    return colours.astype(np.int32) @ np.array([1, 256, 256**2], np.int32)


def to_colours(ids: np.ndarray) -> np.ndarray:
    """RGB colours [H, W, 3], uint8, of numbers [H, W] from 0 to 256**3 - 1."""
    return np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)


class PanopticQuality:
    """Adds up matches of segments over images.

    ``counts``: {category: [sum of IoU, matches, surplus segments, missing segments]}.
    """

    def __init__(self) -> None:
        self.counts: defaultdict[Any, np.ndarray] = defaultdict(lambda: np.zeros(4))

    def add(
        self,
        truth: np.ndarray,
        segments: Iterable[Mapping[str, Any]],
        found: np.ndarray,
        categories: Mapping[int, Any],
    ) -> None:
        """Matches the segments of an image: those of one category and an IoU above 0.5.

        Args:
            truth: numbers [H, W] of the segments, VOID where there is none.
            segments: COCO's, with ``id``, ``category_id`` and ``iscrowd`` (default 0).
            found: numbers [H, W] of the predicted segments, VOID where there is none.
            categories: of the predicted segments, by number.

        Pixels without a segment, and crowds of the same category, do not count against a predicted
        segment that has most of its pixels there.
        """
        known = {one["id"]: one for one in segments}
        pairs, pixels = np.unique(
            np.stack([truth.ravel(), found.ravel()]).astype(np.int64), axis=1, return_counts=True
        )
        shared = dict(zip(map(tuple, pairs.T.tolist()), pixels.tolist(), strict=True))
        areas, wanted = _sums(shared, 1), _sums(shared, 0)
        matched = set()
        for (one, other), common in shared.items():
            if one not in known or other not in categories or known[one].get("iscrowd"):
                continue
            category = known[one]["category_id"]
            union = wanted[one] + areas[other] - common - shared.get((VOID, other), 0)
            if category == categories[other] and common / union > 0.5:
                self.counts[category] += (common / union, 1, 0, 0)
                matched |= {("truth", one), ("found", other)}
        crowds = {}
        for number, one in known.items():
            if one.get("iscrowd"):
                crowds[one["category_id"]] = number
            elif ("truth", number) not in matched:
                self.counts[one["category_id"]] += (0, 0, 0, 1)
        for number, category in categories.items():
            ignored = shared.get((VOID, number), 0)
            ignored += shared.get((crowds[category], number), 0) if category in crowds else 0
            if ("found", number) not in matched and ignored / areas[number] <= 0.5:
                self.counts[category] += (0, 0, 1, 0)

    def average(self, categories: Iterable[Any]) -> dict[str, float]:
        """The means of ``pq``, ``sq`` and ``rq``, 0..1, over the ``n`` categories that occur."""
        rows = np.array([c for k in categories if (c := self.counts[k])[1:].any()]).reshape(-1, 4)
        overlap, matches = rows[:, 0], rows[:, 1]
        recognition = matches / (matches + rows[:, 2:].sum(1) / 2)
        segmentation = overlap / np.maximum(matches, 1)
        means = [
            float(values.mean()) if len(rows) else 0.0
            for values in (segmentation * recognition, segmentation, recognition)
        ]
        return {**dict(zip(("pq", "sq", "rq"), means, strict=True)), "n": len(rows)}


def _sums(shared: Mapping[tuple[int, int], int], place: int) -> dict[int, int]:
    """Areas of the segments by number, of the truth (place 0) or the predictions (1)."""
    areas: defaultdict[int, int] = defaultdict(int)
    for pair, pixels in shared.items():
        areas[pair[place]] += pixels
    return areas
