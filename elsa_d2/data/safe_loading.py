"""Images and label maps from their files, by the rule of `elsa_core.data.images`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor

import elsa_core.data.channels
import elsa_core.data.images
import elsa_core.data.label_maps
from elsa_core.data.images import reason
from elsa_core.data.label_maps import IGNORE
from elsa_core.runtime.errors import DamagedFileError, UsageError


def channels_of(image_format: str) -> int | None:
    """Returns the number of channels of a format "C5", "C13" and so on; None for all others."""
    found = re.fullmatch(r"C([1-9]\d*)", image_format)
    return int(found[1]) if found else None


def read_image(path: str, image_format: str) -> np.ndarray:
    """Reads an image [H, W, C] in a format of Detectron2's, such as "RGB" or "BGR" (0..255), or in
    "C5": its 5 channels, float32, by `elsa_core.data.channels`.

    Raises DamagedFileError, which names the file, if it is damaged or refused.
    """
    try:
        with PathManager.open(path, "rb") as file:
            if channels := channels_of(image_format):
                return elsa_core.data.channels.read_channels(file, channels)
            pixels = elsa_core.data.images.read_image(file)
    except (UsageError, OSError) as error:
        why = reason(error, path)
        raise DamagedFileError(f"image {path} cannot be read: {why}") from error
    return convert_PIL_to_numpy(Image.fromarray(pixels), image_format)


def read_map(path: str) -> np.ndarray:
    """Reads the values of a label map [H, W]; raises DamagedFileError, which names the file."""
    return _read(path, elsa_core.data.label_maps.read_map)


def read_labels(
    path: str,
    num_classes: int,
    reduce_zero_label: bool = False,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Reads a label map [H, W] by `elsa_core.data.label_maps.read_labels`, with 255 for no class.

    Raises DamagedFileError, which names the file, where that raises UsageError.
    """
    read = elsa_core.data.label_maps.read_labels
    return _read(path, read, num_classes, reduce_zero_label, IGNORE, size)


def _read(path: str, read: Callable[..., np.ndarray], *options: Any) -> np.ndarray:
    try:
        with PathManager.open(path, "rb") as file:
            return read(file, path, *options)
    except UsageError as error:
        raise DamagedFileError(str(error)) from error
    except OSError as error:
        why = reason(error, path)
        raise DamagedFileError(f"label map {path} cannot be read: {why}") from error


def read_pair(
    record: dict[str, Any], image_format: str, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the image [H, W, 3] and label map [H, W] of a record; may raise DamagedFileError."""
    image = read_image(record["file_name"], image_format)
    path = record["sem_seg_file_name"]
    reduce = record.get("reduce_zero_label", False)
    return image, read_labels(path, num_classes, reduce, image.shape[:2])


def to_tensor(image: np.ndarray) -> Tensor:
    """[H, W, C] -> [C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
