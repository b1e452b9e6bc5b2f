"""Semantic segmentation in Detectron2: images for training and testing, evaluation, many scales."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.evaluation import SemSegEvaluator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .files import PREFIX
from .reading import read_image, read_labels, read_pair, to_tensor
from .semantic_augmentation import Fit, build_augmentation
from .semantic_config import is_semantic
from .semantic_data import IGNORE


class SemanticMapper:
    """Makes a `SemanticSegmentor`'s input from a record of a data set.

    In training, a crop [3, H, W] and its labels [H, W], padded at the right and at the bottom:
    the image with its mean, which the model turns to 0, the labels with 255. In testing, the image,
    resized, with "height" and "width" of the file.

    Args:
        is_train: whether labels are read.
        augmentations: of image and labels.
        image_format: "RGB" or "BGR".
        num_classes: labels are checked against it.
        pad_to: least height and width, in pixels; in training only.
        pad_value: of each channel.
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
        """Raises UsageError, which names the file, for one that is not whole or does not fit."""
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
        """Pixels that the last two sides lack."""
        down, right = (max(0, w - h) for w, h in zip(self.pad_to, map_.shape[-2:], strict=True))
        return down, right

    def _padded(self, image: Tensor) -> Tensor:
        """uint8 as it is where nothing lacks, else float32, since the mean is no whole number."""
        down, right = self._missing(image)
        if not down and not right:
            return image
        channels, height, width = image.shape
        mean = torch.tensor(self.pad_value).view(-1, 1, 1)
        padded = mean.repeat(1, height + down, width + right)
        padded[:, :height, :width] = image
        return padded


def build_sem_seg_evaluator(
    cfg: CfgNode, dataset_name: str, folder: str = "inference"
) -> SemSegEvaluator:
    """Detectron2's mean IoU; classes that no label map has are left out of the mean."""
    metadata = MetadataCatalog.get(dataset_name)

    def load(path: str, dtype: type) -> np.ndarray:
        reduce = metadata.get("reduce_zero_label", False)
        return read_labels(path, len(metadata.stuff_classes), reduce).astype(dtype)

    return SemSegEvaluator(
        dataset_name,
        output_dir=PREFIX + os.path.join(cfg.OUTPUT_DIR, folder),
        sem_seg_loading_fn=load,
    )


class SegmentorWithTTA(nn.Module):
    """Mean of the class probabilities at several scales, and of mirrored images too.

    Each image is resized to multiples of INPUT.SEM_SEG.SCALE. The logits are resized to the image's
    own size before they become probabilities, as in MMSegmentation's SegTTAModel.

    Args:
        cfg: its TEST.AUG, INPUT.SEM_SEG and INPUT.FORMAT.
        model: a `SemanticSegmentor`.
        ratios: the multiples; None: TEST.AUG.RATIOS.
        flip: whether images are mirrored too; None: TEST.AUG.FLIP.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        ratios: Sequence[float] | None = None,
        flip: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.training = model.training  # which an evaluation restores
        self.image_format = cfg.INPUT.FORMAT
        ratios = cfg.TEST.AUG.RATIOS if ratios is None else ratios
        self.resizes = [Fit(cfg.INPUT.SEM_SEG.SCALE, (ratio, ratio)) for ratio in ratios]
        mirrored = cfg.TEST.AUG.FLIP if flip is None else flip
        self.flips = (False, True) if mirrored else (False,)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """As the model's, but reads the images from "file_name", and gives probabilities."""
        return [{"sem_seg": self._mean(x)} for x in batched_inputs]

    def _mean(self, entry: dict[str, Any]) -> Tensor:
        image = read_image(entry["file_name"], self.image_format)
        height, width = image.shape[:2]
        total: Tensor | int = 0
        for resize in self.resizes:
            resized = to_tensor(resize.get_transform(image).apply_image(image))
            for flip in self.flips:
                one = {
                    **entry,
                    "image": resized.flip(-1) if flip else resized,
                    "height": height,
                    "width": width,
                }
                probabilities = self.model([one])[0]["sem_seg"].softmax(dim=0)
                total = total + (probabilities.flip(-1) if flip else probabilities)
        return total / (len(self.resizes) * len(self.flips))


def at_test_ratios(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """What TEST.SEM_SEG_RATIOS makes of a `SemanticSegmentor`; every other model as it is."""
    ratios = list(cfg.TEST.SEM_SEG_RATIOS)
    if not is_semantic(cfg) or isinstance(model, SegmentorWithTTA) or ratios == [1.0]:
        return model
    return SegmentorWithTTA(cfg, model, ratios, flip=False)
