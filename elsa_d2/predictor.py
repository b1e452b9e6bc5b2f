"""Detectron2's predictor with our checkpoints and resizing."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import DefaultPredictor

from .checkpoint import AtomicCheckpointer
from .data.augmentation import configure_augmentation
from .data.safe_loading import channels_of


class Predictor(DefaultPredictor):
    """DefaultPredictor with the resize of INPUT.RESIZE_BACKEND, for weights of every framework.

    With INPUT.FORMAT "C5", it takes images [H, W, 5] of `elsa_core.data.channels.read_channels`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        weights = cfg.MODEL.WEIGHTS
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = ""
        image_format, cfg.INPUT.FORMAT = cfg.INPUT.FORMAT, "BGR"  # it knows no channels
        super().__init__(cfg)
        cfg.INPUT.FORMAT = self.cfg.INPUT.FORMAT = self.input_format = image_format
        if weights:
            AtomicCheckpointer(self.model).load(weights)
        self.cfg.MODEL.WEIGHTS = weights
        (self.aug,) = configure_augmentation(cfg, build_augmentation(cfg, False), False)

    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        channels = channels_of(self.input_format)
        if channels and original_image.shape[2:] != (channels,):
            raise ValueError(
                f"INPUT.FORMAT {self.input_format} takes images of shape (H, W, {channels}), got "
                f"{original_image.shape}"
            )
        return super().__call__(original_image)
