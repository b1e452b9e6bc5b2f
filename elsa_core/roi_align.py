"""RoIAlign with ``aligned=True`` as a weighted sum of pixels: fast on CPUs, for inference.

torchvision and mmcv visit a map channel by channel. Here the channels of a pixel are adjacent, and
`torch.nn.functional.embedding_bag` adds the pixels of a bin, each once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear

# Boxes at a time, which bounds the memory.
_BLOCK = 1024


def is_fast(feature: Tensor, boxes: Tensor) -> bool:
    """Whether `roi_align` is faster than other kernels: eager float32 on the CPU, no gradients."""
    needs_grad = torch.is_grad_enabled() and (feature.requires_grad or boxes.requires_grad)
    return not needs_grad and linear.is_fast(feature, boxes)


def roi_align(
    feature: Tensor, boxes: Tensor, images: Tensor, scale: float, size: int, sampling_ratio: int
) -> Tensor:
    """Bins of boxes on one map, as `torchvision.ops.roi_align`, whose sums round differently.

    Args:
        feature: [B, C, H, W], float32; fastest with channels-last strides.
        boxes: [R, 4], float32, x1 y1 x2 y2. One that is not finite gives zeros.
        images: [R], index of the image in the batch.
        scale: size of the map divided by that of the boxes' image.
        size: bins along a side.
        sampling_ratio: samples along a side of a bin; 0: as many as pixels of the map, rounded up.

    Returns:
        [R, C, size, size], with channels-last strides.
    """
    pixels = feature.permute(0, 2, 3, 1)
    shape = tuple(pixels.shape[:3])
    table = pixels.reshape(-1, feature.shape[1]).contiguous()  # else a slower kernel
    bins = [
        _sums(table, shape, *block, scale, size, sampling_ratio)
        for block in zip(boxes.split(_BLOCK), images.split(_BLOCK), strict=True)
    ]
    out = torch.cat(bins) if bins else table[:0]
    return out.view(-1, size, size, table.shape[1]).permute(0, 3, 1, 2)


def _sums(
    table: Tensor,
    shape: tuple[int, ...],
    boxes: Tensor,
    images: Tensor,
    scale: float,
    size: int,
    sampling_ratio: int,
) -> Tensor:
    """[R * size * size, C] of a table [B * H * W, C]; ``shape`` is [B, H, W]."""
    _, height, width = shape
    place, counts, weights_y = _axis(boxes[:, 1::2], height, scale, size, sampling_ratio)
    left, across, weights_x = _axis(boxes[:, 0::2], width, scale, size, sampling_ratio)
    # A run is the pixels of one bin in one row of the map.
    square = (len(boxes), size, size)
    runs = counts[:, :, None].expand(square).flatten()
    bin_of_run = torch.repeat_interleave(runs, output_size=int(runs.sum()))
    index = torch.arange(len(bin_of_run), device=table.device)
    row = index - (runs.cumsum(0) - runs)[bin_of_run]
    lengths = across[:, None, :].expand(square).flatten()[bin_of_run]
    start = (images[:, None] * height + place)[:, :, None] * width + left[:, None, :]
    start = start.flatten()[bin_of_run] + row * width
    weight_of_run = _of_bins(weights_y, 2, square)[bin_of_run] + row
    weight_of_run = weights_y.flatten()[weight_of_run]
    first_weight = _of_bins(weights_x, 1, square)[bin_of_run]

    ends = lengths.cumsum(0)
    begins = ends - lengths
    run = torch.repeat_interleave(lengths, output_size=int(ends[-1]) if len(ends) else 0)
    index = torch.arange(len(run), device=table.device)
    weights = weights_x.flatten()[(first_weight - begins)[run] + index] * weight_of_run[run]
    index += (start - begins)[run]
    pixels_of_bin = (counts[:, :, None] * across[:, None, :]).flatten()
    offsets = pixels_of_bin.cumsum(0) - pixels_of_bin
    return F.embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weights)


def _of_bins(weights: Tensor, axis: int, square: tuple[int, int, int]) -> Tensor:
    """Where the weights [R, size, K] of each bin begin, [R * size**2]; ``axis`` is broadcast."""
    begins = torch.arange(weights.shape[0] * weights.shape[1], device=weights.device)
    begins = begins.view(weights.shape[:2]) * weights.shape[2]
    return begins.unsqueeze(axis).expand(square).flatten()


def _axis(
    sides: Tensor, length: int, scale: float, size: int, sampling_ratio: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels of each bin along one axis of a map of ``length``; ``sides`` [R, 2] of the boxes.

    Returns:
        The first pixel [R, size], their number [R, size], their weights [R, size, K].
    """
    start, end = (sides * scale - 0.5)[:, :, None, None].unbind(1)
    step = (end - start) / size
    samples = torch.full_like(step, sampling_ratio) if sampling_ratio > 0 else step.ceil()
    samples = samples.nan_to_num(0.0, 0.0, 0.0)
    most = int(samples.amax()) if samples.numel() else 0
    index, sample = (torch.arange(n, device=sides.device) for n in (size, max(most, 1)))
    samples = samples.clamp(min=0)
    position = start + index[:, None] * step + (sample + 0.5) * (step / samples.clamp(min=1))
    inside = (sample < samples) & (position >= -1) & (position <= length)
    position = position.clamp(0, length - 1)
    low = position.floor()
    first = torch.where(inside, low, length).amin(2)
    last = torch.where(inside, (low + 1).clamp(max=length - 1), -1).amax(2)
    counts = (last - first + 1).clamp(min=0)
    first = first.clamp(max=length - 1)
    pixels = torch.arange(int(counts.amax()) if counts.numel() else 0, device=sides.device)
    distance = (first[:, :, None, None] + pixels[:, None] - position[:, :, None, :]).abs()
    weights = ((1 - distance).clamp(min=0) * inside[:, :, None, :]).sum(3)
    return first.long(), counts.long(), weights / samples.clamp(min=1)
