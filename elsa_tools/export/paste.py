"""`elsa_tools.predict.paste` in PyTorch, for graphs that paste the masks themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def paste(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> Tensor:
    """Return `paste_masks` of all masks at once: bool [N, height, width].

    It can be exported with dynamic sizes. It needs four bytes for each number of its result beside
    the result: 100 masks of 800 x 1333 take 0.5 GB.

    Args:
        masks: logits [N, h, w], over the box.
        boxes: [N, 4], x1 y1 x2 y2 in pixels of the image.
    """
    boxes = boxes.float()
    rows = _weights(boxes[:, 1], boxes[:, 3], height, masks.shape[1])
    columns = _weights(boxes[:, 0], boxes[:, 2], width, masks.shape[2])
    # From the mask's side outward, as `paste_masks`.
    sampled = torch.matmul(masks.float().sigmoid(), columns.transpose(1, 2))
    return torch.matmul(rows, sampled) >= threshold


def _weights(start: Tensor, end: Tensor, length: int, cells: int) -> Tensor:
    """[N, length, cells]: the share of each cell in each pixel; 0 around the extent."""
    start, end = start[:, None], end[:, None]
    pixel = torch.arange(length, dtype=torch.float32, device=start.device)
    extent = end - start
    inside = (pixel >= start.floor() - 1) & (pixel < end.ceil() + 1)
    inside = inside & (extent > 0) & (extent <= torch.finfo(torch.float32).max)
    position = (pixel + 0.5 - start) / extent * cells - 0.5
    cell = torch.arange(cells, dtype=torch.float32, device=start.device)
    weights = (1 - (position[:, :, None] - cell).abs()).clamp(min=0)
    return torch.where(inside[:, :, None], weights, 0.0)
