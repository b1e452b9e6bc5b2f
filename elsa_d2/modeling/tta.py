"""Test-time augmentation of detectors: several sizes, and flipped images."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA
from torch import nn

from elsa_core.runtime.errors import UsageError
from elsa_d2.data.augmentation import resize_class


class DetectionMapperTTA(DatasetMapperTTA):
    """DatasetMapperTTA with INPUT.RESIZE_BACKEND; takes images in the size of their file."""

    @configurable
    def __init__(self, *, resize: type[T.ResizeShortestEdge], **options: Any) -> None:
        super().__init__(**options)
        self.resize = resize

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "resize": resize_class(cfg)}

    def __call__(self, dataset_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns copies of an entry with an augmented "image" [C, H, W] and its "transforms"."""
        image = dataset_dict["image"].permute(1, 2, 0).numpy()
        rest = {key: value for key, value in dataset_dict.items() if key != "image"}
        entries = []
        for size in self.min_sizes:
            for flips in ([], [T.RandomFlip(prob=1.0)]) if self.flip else ([],):
                steps = [self.resize([size], self.max_size, "choice"), *flips]
                changed, transforms = T.apply_augmentations(steps, np.copy(image))
                pixels = torch.from_numpy(np.ascontiguousarray(changed.transpose(2, 0, 1)))
                entries.append({**copy.deepcopy(rest), "image": pixels, "transforms": transforms})
        return entries


def with_test_time_augmentation(cfg: CfgNode, model: nn.Module) -> tuple[CfgNode, nn.Module]:
    """Returns the config of a test loader that does not resize, and the model under TEST.AUG.

    Raises:
        UsageError: for models other than GeneralizedRCNN.
    """
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise UsageError(
            "TEST.AUG.ENABLED needs MODEL.META_ARCHITECTURE GeneralizedRCNN, "
            f"got {cfg.MODEL.META_ARCHITECTURE}"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.freeze()
    return cfg, GeneralizedRCNNWithTTA(cfg, model, DetectionMapperTTA(cfg))
