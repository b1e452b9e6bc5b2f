"""Random inputs for the operators of `elsa_core.detection`."""

from __future__ import annotations

import torch
from torch import Tensor

SCALES = (1 / 4, 1 / 8, 1 / 16)


def random_boxes(*shape: int, extent: float = 100, grid: float = 0, seed: int = 0) -> Tensor:
    """Boxes [*shape, 4], a tenth of them of no extent; on multiples of ``grid`` where it counts."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * extent * 1.2 - extent * 0.1
    side = torch.rand(*shape, 2, generator=generator) ** 2 * extent
    side[torch.rand(*shape, generator=generator) < 0.1] = 0
    boxes = torch.cat((corner, corner + side), -1)
    return (boxes / grid).round() * grid if grid else boxes


def random_scores(*shape: int, levels: int = 0, seed: int = 1) -> Tensor:
    scores = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return (scores * levels).round() / levels if levels else scores


def pyramid(channels: int = 5, batch: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(batch, channels, 100 // stride, 132 // stride, generator=generator).to(dtype)
        for stride in (4, 8, 16)
    ]


def rois(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(3, (count,), generator=generator)
    levels = torch.randint(3, (count,), generator=generator)
    return random_boxes(count, seed=4), images, levels
