"""Images and label maps from their files, by the rule of `elsa_core.data.images`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor

import elsa_core.data.images
import elsa_core.data.label_maps
from elsa_core.data.images import reason
from elsa_core.runtime.errors import DamagedFileError, UsageError


def read_image(path: str, image_format: str) -> np.ndarray:
    """[H, W, C] in one of Detectron2's formats, such as "RGB" or "BGR" in 0..255.

    Raises DamagedFileError, which names the file, where it is not whole or refused.
    """
    try:
        with PathManager.open(path, "rb") as file:
            pixels = elsa_core.data.images.read_image(file)
    except (UsageError, OSError) as error:
        why = reason(error, path)
        raise DamagedFileError(f"image {path} cannot be read: {why}") from error
    return convert_PIL_to_numpy(Image.fromarray(pixels), image_format)


def read_map(path: str) -> np.ndarray:
    """The values in a label map [H, W]. Raises DamagedFileError, which names the file."""
    return _read(path, elsa_core.data.label_maps.read_map)


def read_labels(path: str, num_classes: int, reduce_zero_label: bool = False) -> np.ndarray:
    """A label map [H, W]: 0..num_classes - 1, or 255 for no class; see `elsa_core.data.label_maps`.

    Raises DamagedFileError, which names the file, for one that is no such image, and for other
    labels.
    """
    return _read(path, elsa_core.data.label_maps.read_labels, num_classes, reduce_zero_label)


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
    """Image [H, W, 3] and label map [H, W] of a record. Raises DamagedFileError for broken ones."""
    image = read_image(record["file_name"], image_format)
    path = record["sem_seg_file_name"]
    labels = read_labels(path, num_classes, record.get("reduce_zero_label", False))
    if image.shape[:2] != labels.shape:
        raise DamagedFileError(
            f"a label map must be as large as its image, got {path} of {labels.shape} pixels for "
            f"{image.shape[:2]}"
        )
    return image, labels


def to_tensor(image: np.ndarray) -> Tensor:
    """[H, W, C] -> [C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
