"""Pastes the masks of a detector's exported model into the image; needs NumPy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Numbers in the sampled part of a mask at a time.
_MOST = 2**22


def paste_masks(
    masks: NDArray[np.floating],
    boxes: NDArray[np.floating],
    size: tuple[int, int],
    threshold: float = 0.5,
) -> NDArray[np.bool_]:
    """Return where the masks' probability is at least ``threshold`` in an image, bool [N, *size].

    The probabilities are sampled bilinearly over their box, as by Detectron2 and MMDetection. A
    mask is empty where its box has no extent, lies outside the image or is not finite.

    Args:
        masks: logits [N, h, w], over the box.
        boxes: [N, 4], x1 y1 x2 y2 in pixels of the image.
        size: height and width of the image.

    Raises:
        ValueError: the shapes are others.
    """
    if masks.ndim != 3 or boxes.shape != (len(masks), 4):
        raise ValueError(
            "paste_masks needs masks [N, h, w] and boxes [N, 4], got "
            f"{list(masks.shape)} and {list(boxes.shape)}"
        )
    pasted = np.zeros((len(masks), *size), bool)
    boxes = boxes.astype(np.float32)
    for mask, (x1, y1, x2, y2), out in zip(masks, boxes, pasted, strict=True):
        if not (np.isfinite([x1, y1, x2, y2]).all() and x1 < x2 and y1 < y2):
            continue
        # Beyond 80, the probability is 0 or 1 and its exponential need not be a number.
        probabilities = 1 / (1 + np.exp(-mask.astype(np.float32).clip(-80, 80)))
        top, bottom = _pixels(y1, y2, size[0])
        left, right = _pixels(x1, x2, size[1])
        columns = _weights(x1, x2, left, right, mask.shape[1])
        sampled = probabilities @ columns.T
        rows = max(1, _MOST // max(1, right - left))
        for first in range(top, bottom, rows):
            last = min(first + rows, bottom)
            values = _weights(y1, y2, first, last, mask.shape[0]) @ sampled
            np.greater_equal(values, np.float32(threshold), out=out[first:last, left:right])
    return pasted


def _pixels(start: np.float32, end: np.float32, length: int) -> tuple[int, int]:
    """First and last + 1 of the pixels on which an extent may leave a mask."""
    first, last = int(np.floor(start)) - 1, int(np.ceil(end)) + 1
    return min(max(first, 0), length), min(max(last, 0), length)


def _weights(
    start: np.float32, end: np.float32, first: int, last: int, cells: int
) -> NDArray[np.float32]:
    """[pixels, cells]: the share of each cell in the pixels ``first`` to ``last`` - 1."""
    centre = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    position = (centre - start) / (end - start) * np.float32(cells) - np.float32(0.5)
    distance = np.abs(position[:, None] - np.arange(cells, dtype=np.float32))
    return np.maximum(1 - distance, 0)
