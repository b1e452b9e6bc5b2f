"""The image that both frameworks see."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from elsa_core.runtime.errors import UsageError


def read_image(path: str | None) -> Tensor:
    """[H, W, 3], 8 bits, blue first: a file as `elsa_core.data.images` reads it, or a drawn one.

    The drawn one has 480 rows and 640 columns.

    Raises UsageError for a path that is no file, and for a file that cannot be read.
    """
    if path is None:
        return drawn_image()
    if not os.path.isfile(path):
        raise UsageError(f"--image {path} does not exist")
    import elsa_core.data.images

    try:
        return torch.from_numpy(elsa_core.data.images.read_image(path)[..., ::-1].copy())
    except UsageError as error:
        raise UsageError(f"--image {path} cannot be read: {error}") from error


def drawn_image(height: int = 480, width: int = 640) -> Tensor:
    """Waves with discs and boxes of many sizes on them, [H, W, 3], 8 bits; always the same."""
    y = torch.arange(height).float()[:, None, None]
    x = torch.arange(width).float()[None, :, None]
    colour = torch.tensor([0.0, 1.0, 2.0])
    image = 120 + 50 * torch.sin(x / 37 + colour) * torch.cos(y / 23 - colour)
    for index in range(24):
        centre_y = (index * 0.377 % 1) * height
        centre_x = (index * 0.618 % 1) * width
        radius = 8 + 7 * (index % 9)
        far_y, far_x = (y - centre_y).abs(), (x - centre_x).abs()
        inside = torch.maximum(far_y, far_x) if index % 2 else (far_y**2 + far_x**2).sqrt()
        paint = torch.tensor([(index * 53) % 256, (index * 97) % 256, (index * 151) % 256])
        image = torch.where(inside < radius, paint.float(), image)
    return image.clamp(0, 255).byte()
