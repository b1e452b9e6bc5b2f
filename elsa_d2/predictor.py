"""Detectron2's predictor with our checkpoints and resizing."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import DefaultPredictor

from .checkpoint import AtomicCheckpointer
from .data.augmentation import configure_augmentation


class Predictor(DefaultPredictor):
    """DefaultPredictor with the resize of INPUT.RESIZE_BACKEND, for weights of every framework."""

    def __init__(self, cfg: CfgNode) -> None:
        weights = cfg.MODEL.WEIGHTS
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = ""
        super().__init__(cfg)
        if weights:
            AtomicCheckpointer(self.model).load(weights)
        self.cfg.MODEL.WEIGHTS = weights
        (self.aug,) = configure_augmentation(cfg, build_augmentation(cfg, False), False)
