"""A recognised checkpoint: its kind, and its tensors under unified names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from elsa_core.variants import Arch

from .names import CASCADE, MASK_RCNN, UPERNET
from .shapes import arch_name

# Families: the code base whose names and conventions the file follows.
ORIGINAL, OPENMMLAB, DETECTRON2 = "original", "openmmlab", "detectron2"
MMPRETRAIN, BACKBONE_FILE, SWIN = "mmpretrain", "backbone", "swin"
# Kinds that are not whole detectors or segmentors.
CLASSIFIER, BACKBONE, OTHER = "classifier", "backbone", "other"


@dataclass
class Source:
    """A recognised checkpoint.

    ``tensors``: {name: (name in the file, tensor)}. Classifiers and backbones have the names of
    `ELSASwin`, all other models OpenMMLab's.
    ``dropped``: [(name in the file, reason)].
    """

    family: str
    kind: str
    arch: Arch
    tensors: dict[str, tuple[str, Tensor]]
    dropped: list[tuple[str, str]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    ema: bool = False

    def __str__(self) -> str:
        kinds = {MASK_RCNN: "Mask R-CNN", CASCADE: "Cascade Mask R-CNN", UPERNET: "UPerNet"}
        families = {
            ORIGINAL: "original release",
            OPENMMLAB: "OpenMMLab",
            DETECTRON2: "Detectron2",
            MMPRETRAIN: "MMPretrain",
            BACKBONE_FILE: "bare backbone",
            SWIN: "stock Swin",
        }
        weights = ", EMA weights" if self.ema else ""
        backbone = "Swin" if self.family == SWIN else f"ELSA-Swin {arch_name(self.arch)}"
        kind = kinds.get(self.kind, self.kind)
        return f"{families[self.family]}, {kind}, {backbone}{weights}"
