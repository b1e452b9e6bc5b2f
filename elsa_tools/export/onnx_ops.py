"""The operators of `elsa_core.detection`, and sigmoid, in standard ONNX operators.

The result depends on no order that an executor is free to choose: it sorts what it selects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnxscript import opset20 as op

from elsa_core.detection import OUTSIDE, float32_threshold

from .graph import Value, constant, ints, scalar


def topk(scores: Value, k: Value | int) -> tuple[Value, Value]:
    """``elsa::topk``. Ties go to the lower index, as ONNX asks of TopK."""
    if isinstance(k, int):
        k = ints(k)
    count = op.Shape(scores, start=1, end=2)
    values, indices = op.TopK(scores, op.Min(k, count), axis=1)
    return values, indices


def nms(
    boxes: Value, scores: Value, iou_threshold: float, score_threshold: float, most: int
) -> tuple[Value, Value]:
    """``elsa::nms``: NonMaxSuppression, then a sort of the scores that it has kept."""
    selected = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, ints(1)),
        ints(most),
        constant(np.array([float32_threshold(iou_threshold)], np.float32)),
        constant(np.array([score_threshold], np.float32)),
    )
    kept = op.Gather(selected, ints(0, 2), axis=1)  # [n, 2]: image and box
    absent = op.Expand(constant(np.float32(-1)), op.Shape(scores))
    sparse = op.ScatterND(absent, kept, op.GatherND(scores, kept))
    batch = op.Shape(scores, start=0, end=1)
    more = op.Expand(constant(np.float32(-1)), op.Concat(batch, ints(most), axis=0))
    values, indices = op.TopK(op.Concat(sparse, more, axis=1), ints(most), axis=1)
    present = op.Greater(values, constant(np.float32(-1)))
    return op.Where(present, indices, scalar(0)), values


def roi_align(
    maps: Sequence[Value],
    boxes: Value,
    images: Value,
    levels: Value,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
) -> Value:
    """``elsa::roi_align``: a RoiAlign of each level, then the boxes' own order."""
    boxes = _replace_empty(boxes, allowed=sampling_ratio > 0)
    orders, parts = [], []
    for level, (feature, scale) in enumerate(zip(maps, scales, strict=True)):
        rows = op.Squeeze(op.NonZero(op.Equal(levels, scalar(level))), ints(0))
        part = op.RoiAlign(
            feature,
            op.Gather(boxes, rows),
            op.Gather(images, rows),
            coordinate_transformation_mode="half_pixel",
            mode="avg",
            output_height=size,
            output_width=size,
            sampling_ratio=sampling_ratio,
            spatial_scale=scale,
        )
        orders.append(rows)
        parts.append(part)
    order = op.Concat(*orders, axis=0)
    count = op.Shape(order)
    places = op.Range(scalar(0), op.Squeeze(count), scalar(1))
    inverse = op.ScatterElements(places, order, places)
    return op.Gather(op.Concat(*parts, axis=0), inverse)


def sigmoid(x: Value) -> Value:
    """By an exponential: onnxruntime's Sigmoid has an absolute error of 1e-7 and does not increase
    everywhere, so that proposals of small probability would be sorted in another order."""
    one = constant(np.float32(1))
    return op.Reciprocal(op.Add(op.Exp(op.Neg(x)), one))


def _replace_empty(boxes: Value, allowed: bool) -> Value:
    """The boxes [R, 4], with `OUTSIDE` for those that are not finite.

    Also for those of no extent unless they are ``allowed``: where the number of samples adapts to
    the extent they have none, and OpenVINO would divide by it.
    """
    corners = (
        op.Slice(boxes, ints(0), ints(2), ints(1)),
        op.Slice(boxes, ints(2), ints(4), ints(1)),
    )
    extent = op.Sub(*reversed(corners))
    most = constant(np.finfo(np.float32).max)
    if allowed:
        valid = op.LessOrEqual(op.Abs(extent), most)
    else:
        valid = op.And(op.Greater(extent, constant(np.float32(0))), op.LessOrEqual(extent, most))
    valid = op.ReduceMin(op.Cast(valid, to=7), ints(1))
    return op.Where(op.Cast(valid, to=9), boxes, constant(np.array(OUTSIDE, np.float32)))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.sigmoid.default: sigmoid,
    torch.ops.elsa.topk.default: topk,
    torch.ops.elsa.nms.default: nms,
    torch.ops.elsa.roi_align.default: roi_align,
}
"""For the ``custom_translation_table`` of `torch.onnx.export`."""
