"""The operators ``elsa::topk``, ``elsa::nms`` and ``elsa::roi_align`` of detectors, for inference.

Their shapes are known where PyTorch exports a program. They compute in float32, by the rules of
`torchvision.ops.nms` and of `torchvision.ops.roi_align` with ``aligned=True``: with torchvision's
kernels for CUDA where they are installed, else in plain PyTorch. torchvision's kernels for the CPU
compare all pairs of boxes and add one sample after another, which takes several times as long.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OUTSIDE = (-1e5, -1e5, 1 - 1e5, 1 - 1e5)
"""A box that lies outside every map: its RoIAlign is 0."""
# Boxes that the plain NMS compares with those that it has kept at a time.
_NMS_BLOCK = 128
# Numbers in the weights of the plain RoIAlign at a time.
_ROI_BLOCK = 2**23


@functools.cache
def has_kernel(name: str, device_type: str) -> bool:
    """Whether a kernel of ``torchvision::name`` is installed, and of use, for the device."""
    if device_type != "cuda":
        return False
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: built for another PyTorch
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", "CUDA")


def float32_threshold(threshold: float) -> float:
    """The float32 that every float32 exceeds if and only if it exceeds ``threshold``."""
    rounded = torch.tensor(threshold, dtype=torch.float32, device="cpu")
    if rounded.item() > threshold:
        rounded = rounded.nextafter(rounded - 1)
    return rounded.item()


@torch.library.custom_op("elsa::topk", mutates_args=())
def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best ``min(k, N)`` of scores [B, N], best first, ties by lower index.

    Returns:
        Values [B, min(k, N)] and their indices, int64 of the same shape.

    Raises:
        ValueError: ``scores`` has other dimensions than two, or ``k`` is negative.
    """
    _check_topk(scores, k)
    k = min(k, scores.shape[1])
    if k == scores.shape[1] or k == 0:
        values, indices = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :k].clone(), indices[:, :k].clone()
    # A sort of the few that can be among the best. NaN is the largest number here, as in `sort`.
    least = scores.topk(k, dim=1).values[:, -1:]
    chosen = []
    for row, able in zip(scores, ~(scores < least), strict=True):
        candidates = able.nonzero().squeeze(1)
        order = row[candidates].sort(descending=True, stable=True).indices[:k]
        chosen.append(candidates[order])
    indices = torch.stack(chosen) if chosen else scores.new_empty(0, k, dtype=torch.int64)
    return scores.gather(1, indices), indices


@torch.library.custom_op("elsa::nms", mutates_args=())
def nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, most: int
) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression in each image, among boxes of score > ``score_threshold``.

    A box is suppressed where its IoU with a kept one of higher score, or of equal score and lower
    index, exceeds ``iou_threshold``.

    Args:
        boxes: [B, N, 4], x1 y1 x2 y2.
        scores: [B, N], above -1 where they exceed ``score_threshold``.
        most: how many boxes of an image are kept at most.

    Returns:
        Indices, int64, and scores of the kept boxes, [B, most] each, best first. A row without a
        box has index 0 and score -1.

    Raises:
        ValueError: the shapes are others, or ``most`` is negative.
    """
    _check_nms(boxes, scores, most)
    if boxes.shape[:2] != scores.shape:
        raise ValueError(
            "elsa::nms needs boxes [B, N, 4] and scores [B, N], got "
            f"{list(boxes.shape)} and {list(scores.shape)}"
        )
    suppress = _torchvision_nms if has_kernel("nms", boxes.device.type) else _plain_nms
    indices = scores.new_zeros(len(scores), most, dtype=torch.int64)
    values = scores.new_full((len(scores), most), -1)
    for image, able in enumerate(scores > score_threshold):
        candidates = able.nonzero().squeeze(1)
        of_candidates = scores[image, candidates].float()
        kept = suppress(boxes[image, candidates].float(), of_candidates, iou_threshold, most)
        kept = candidates[kept]
        indices[image, : len(kept)] = kept
        values[image, : len(kept)] = scores[image, kept]
    return indices, values


@torch.library.custom_op("elsa::roi_align", mutates_args=())
def roi_align(
    maps: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
) -> Tensor:
    """RoIAlign with ``aligned=True`` of each box on the map of its level.

    Args:
        maps: [B, C, H_l, W_l] of each level.
        boxes: [R, 4], x1 y1 x2 y2 in pixels of the image. One that is not finite gives zeros.
        images: [R], int64, index of the image in the batch.
        levels: [R], int64, index of the map.
        scales: size of each map divided by the size of the image.
        size: bins along a side.
        sampling_ratio: samples along a side of a bin; 0: as many as pixels of the map, rounded up.

    Returns:
        [R, C, size, size], in the dtype of the maps.

    Raises:
        ValueError: the shapes are others, or the numbers of maps and scales differ.
    """
    _check_roi_align(maps, boxes, scales, size)
    if not images.shape == levels.shape == boxes.shape[:1]:
        raise ValueError(
            "elsa::roi_align needs boxes [R, 4], images [R] and levels [R], got "
            f"{list(boxes.shape)}, {list(images.shape)} and {list(levels.shape)}"
        )
    align = _torchvision_roi_align if has_kernel("roi_align", boxes.device.type) else _roi_align
    boxes = boxes.float()
    # Kernels read outside the memory of the map at coordinates that are not finite.
    outside = boxes.new_tensor(OUTSIDE)
    boxes = torch.where(boxes.isfinite().all(1, keepdim=True), boxes, outside)
    out = maps[0].new_zeros(len(boxes), maps[0].shape[1], size, size)
    for level, (feature, scale) in enumerate(zip(maps, scales, strict=True)):
        rows = (levels == level).nonzero().squeeze(1)
        if len(rows):
            found = align(feature.float(), boxes[rows], images[rows], scale, size, sampling_ratio)
            out[rows] = found.to(out.dtype)
    return out


@topk.register_fake
def _topk_fake(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check_topk(scores, k)
    shape = (scores.shape[0], torch.sym_min(k, scores.shape[1]))
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


@nms.register_fake
def _nms_fake(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, most: int
) -> tuple[Tensor, Tensor]:
    _check_nms(boxes, scores, most)
    shape = (scores.shape[0], most)
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape)


@roi_align.register_fake
def _roi_align_fake(
    maps: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
) -> Tensor:
    _check_roi_align(maps, boxes, scales, size)
    return maps[0].new_empty(boxes.shape[0], maps[0].shape[1], size, size)


def _check_topk(scores: Tensor, k: int) -> None:
    if scores.dim() != 2 or k < 0:
        raise ValueError(
            f"elsa::topk needs scores [B, N] and k >= 0, got {list(scores.shape)} and {k}"
        )


def _check_nms(boxes: Tensor, scores: Tensor, most: int) -> None:
    if boxes.dim() != 3 or boxes.shape[2] != 4 or scores.dim() != 2 or most < 0:
        raise ValueError(
            "elsa::nms needs boxes [B, N, 4], scores [B, N] and most >= 0, got "
            f"{list(boxes.shape)}, {list(scores.shape)} and {most}"
        )


def _check_roi_align(
    maps: Sequence[Tensor], boxes: Tensor, scales: Sequence[float], size: int
) -> None:
    shapes = [list(feature.shape) for feature in maps]
    if not shapes or len(shapes) != len(scales) or any(len(shape) != 4 for shape in shapes):
        raise ValueError(
            "elsa::roi_align needs maps [B, C, H, W] and as many scales, at least one, got "
            f"{shapes} and {len(scales)} scales"
        )
    if boxes.dim() != 2 or boxes.shape[1] != 4 or size < 1:
        raise ValueError(
            f"elsa::roi_align needs boxes [R, 4] and size >= 1, got {list(boxes.shape)} and {size}"
        )


def _torchvision_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)[:most]


def _plain_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
    """Indices of the kept ones of boxes [N, 4], best first, at most ``most``."""
    order = scores.sort(descending=True, stable=True).indices
    threshold = float32_threshold(iou_threshold)
    kept = order[:0]
    for block in order.split(_NMS_BLOCK):
        if len(kept) >= most:
            break
        block = block[~(_iou(boxes[kept], boxes[block]) > threshold).any(0)]
        overlaps = (_iou(boxes[block], boxes[block]) > threshold).triu(1)
        # After n steps the first n are as one after another would leave them.
        alive, before = torch.ones_like(block, dtype=torch.bool), None
        while before is None or not torch.equal(alive, before):
            alive, before = ~overlaps[alive].any(0), alive
        kept = torch.cat((kept, block[alive]))
    return kept[:most]


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU [N, M] of boxes [N, 4] and [M, 4]; NaN of two boxes of no extent."""
    extent = torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])
    shared = extent.clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    return shared / (areas[0][:, None] + areas[1] - shared)


def _torchvision_roi_align(
    feature: Tensor, boxes: Tensor, images: Tensor, scale: float, size: int, sampling_ratio: int
) -> Tensor:
    rois = torch.cat((images[:, None].to(boxes.dtype), boxes), 1)
    return torch.ops.torchvision.roi_align(feature, rois, scale, size, size, sampling_ratio, True)


def _roi_align(
    feature: Tensor, boxes: Tensor, images: Tensor, scale: float, size: int, sampling_ratio: int
) -> Tensor:
    """[R, C, size, size] of boxes [R, 4] on one map [B, C, H, W]."""
    feature = feature.permute(0, 2, 3, 1).contiguous()
    out = feature.new_empty(len(boxes), size, size, feature.shape[3])
    rows = max(1, _ROI_BLOCK // (size * (feature.shape[1] + feature.shape[2])))
    blocks = zip(out.split(rows), boxes.split(rows), images.split(rows), strict=True)
    for block, start_end, image in blocks:
        start, end = (start_end * scale - 0.5).split(2, 1)
        extent = end - start
        ys, xs = (
            _bins(start[:, axis], extent[:, axis], feature.shape[2 - axis], size, sampling_ratio)
            for axis in (1, 0)
        )
        for index, (of_box, y, x) in enumerate(zip(image.tolist(), ys.used, xs.used, strict=True)):
            part = feature[of_box, y, x]
            # Samples are bilinear, so that the mean of a bin is a product along each axis.
            rows_of_bins = ys.weights[index, :, y] @ part.flatten(1)
            columns = rows_of_bins.unflatten(1, part.shape[1:])
            torch.matmul(xs.weights[index, :, x], columns, out=block[index])
    return out.permute(0, 3, 1, 2)


class _Bins(NamedTuple):
    """Weights [R, size, length] of a map's positions in the mean of each bin, along one axis.

    Those outside the slice ``used`` of a box are 0.
    """

    weights: Tensor
    used: list[slice]


def _bins(start: Tensor, extent: Tensor, length: int, size: int, sampling_ratio: int) -> _Bins:
    width = (extent / size)[:, None, None]
    wanted = torch.full_like(width, sampling_ratio) if sampling_ratio > 0 else width.ceil()
    samples = wanted.clamp(min=1)
    sample = torch.arange(int(samples.max()), device=start.device)
    position = start[:, None, None] + torch.arange(size, device=start.device)[:, None] * width
    position = position + (sample + 0.5) * width / samples  # [R, size, samples]
    counted = sample < wanted
    position = torch.where(counted, position, position[:, :, :1])
    weight = (counted & (position >= -1) & (position <= length)) / samples
    position = position.clamp(0, length - 1)
    low = position.long().clamp(0, length - 1)
    high = (low + 1).clamp(max=length - 1)
    weights = start.new_zeros(len(start), size, length)
    weights.scatter_add_(2, low, (1 - (position - low)) * weight)
    weights.scatter_add_(2, high, (position - low) * weight)
    first, last = low.amin((1, 2)).tolist(), high.amax((1, 2)).tolist()
    return _Bins(weights, [slice(a, b + 1) for a, b in zip(first, last, strict=True)])
