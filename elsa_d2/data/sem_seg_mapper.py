"""Maps the records of a data set to the input of a `SemanticSegmentor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from torch import Tensor

from .safe_loading import read_image, read_pair, to_tensor
from .sem_seg import IGNORE
from .sem_seg_augmentation import build_augmentation


class SemSegMapper:
    """Maps a record of a data set to the input of a `SemanticSegmentor`.

    In training, this is a crop [C, H, W] and its labels [H, W], padded at the right and at the
    bottom: the image with its mean, which the model turns to 0, the labels with 255. In testing, it
    is the resized image, with "height" and "width" of the file.

    Args:
        is_train: whether to read labels.
        augmentations: augmentations of image and labels.
        image_format: "RGB", "BGR", or "C5" and so on.
        num_classes: number of classes, which the labels must not exceed.
        pad_to: minimum height and width in pixels, in training only.
        pad_value: padding of each channel.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        num_classes: int,
        pad_to: Sequence[int],
        pad_value: Sequence[float],
    ) -> None:
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format, self.num_classes = image_format, num_classes
        self.pad_to, self.pad_value = tuple(pad_to), tuple(pad_value)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {
            "is_train": is_train,
            "augmentations": build_augmentation(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "pad_to": cfg.INPUT.SEM_SEG.CROP_SIZE,
            "pad_value": cfg.MODEL.PIXEL_MEAN,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Raises UsageError, which names the file, if it is damaged or does not match."""
        if self.is_train:
            image, labels = read_pair(record, self.image_format, self.num_classes)
        else:
            image, labels = read_image(record["file_name"], self.image_format), None
        height, width = image.shape[:2]
        data = T.AugInput(image, sem_seg=labels)
        self.augmentations(data)
        result = {"file_name": record["file_name"], "height": height, "width": width}
        result["image"] = to_tensor(data.image)
        if labels is not None:
            result["image"] = self._padded(result["image"])
            down, right = self._missing(data.sem_seg)
            target = torch.from_numpy(np.ascontiguousarray(data.sem_seg)).long()
            result["sem_seg"] = F.pad(target, (0, right, 0, down), value=IGNORE)
        return result

    def _missing(self, map_: np.ndarray | Tensor) -> tuple[int, int]:
        """Returns the padding that the last two dimensions need."""
        down, right = (max(0, w - h) for w, h in zip(self.pad_to, map_.shape[-2:], strict=True))
        return down, right

    def _padded(self, image: Tensor) -> Tensor:
        """Pads; returns float32 if there is padding, since the mean is no integer, else uint8."""
        down, right = self._missing(image)
        if not down and not right:
            return image
        channels, height, width = image.shape
        mean = torch.tensor(self.pad_value).view(-1, 1, 1)
        padded = mean.repeat(1, height + down, width + right)
        padded[:, :height, :width] = image
        return padded
