"""A recognised checkpoint: its kind, and its tensors under unified names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from elsa_core.variants import Arch, VoloArch

from .names import CASCADE, MASK_RCNN, UPERNET
from .shapes import Backbone, arch_name, arch_of, has_masks
from .volo import Volo

# Families: the code base whose names and conventions the file follows.
ORIGINAL, OPENMMLAB, DETECTRON2 = "original", "openmmlab", "detectron2"
MMPRETRAIN, BACKBONE_FILE, SWIN, VOLO = "mmpretrain", "backbone", "swin", "volo"
# Kinds that are not whole detectors or segmentors.
CLASSIFIER, BACKBONE, OTHER = "classifier", "backbone", "other"
RGB = 3


@dataclass
class Source:
    """A recognised checkpoint.

    ``tensors``: {name: (name in the file, tensor)}. Classifiers and backbones have the names of
    `ELSASwin` and `ELSAVoloClassifier`, all other models OpenMMLab's.
    ``dropped``: [(name in the file, reason)].
    ``ema``: whether they are averaged weights.
    ``has_both``: whether the file holds averaged weights and others.
    """

    family: str
    kind: str
    backbone: Backbone
    tensors: dict[str, tuple[str, Tensor]]
    dropped: list[tuple[str, str]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    ema: bool = False
    has_both: bool = False

    @property
    def arch(self) -> Arch | VoloArch:
        return arch_of(self.backbone)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        volo = isinstance(self.backbone, Volo)
        first = f"patch_embed.{'conv.0' if volo else 'proj'}.weight"
        _, weight = self.tensors.get(first) or self.tensors.get(f"backbone.{first}") or ("", None)
        return (weight is not None and weight.dim() == 4 and weight.shape[1]) or RGB

    @property
    def is_stock(self) -> bool:
        """Whether it holds a Swin or VOLO, a warm start for a model with ELSA."""
        return self.family in (SWIN, VOLO)

    def __str__(self) -> str:
        masked = has_masks(self.tensors)
        kinds = {
            MASK_RCNN: "Mask R-CNN" if masked else "Faster R-CNN",
            CASCADE: f"Cascade {'Mask ' * masked}R-CNN",
            UPERNET: "UPerNet",
        }
        volo = isinstance(self.backbone, Volo)
        families = {
            ORIGINAL: "VOLO's names" if volo else "original release",
            OPENMMLAB: "OpenMMLab",
            DETECTRON2: "Detectron2",
            MMPRETRAIN: "MMPretrain",
            BACKBONE_FILE: "bare backbone",
            SWIN: "stock Swin",
            VOLO: "stock VOLO",
        }
        weights = (
            ", EMA weights" if self.ema else ", the optimizer's weights" if self.has_both else ""
        )
        name = arch_name(self.arch).replace("volo_d", "D")
        backbone = {
            SWIN: "Swin",
            VOLO: f"VOLO {name}",
        }.get(self.family, f"ELSA-{'VOLO' if volo else 'Swin'} {name}")
        kind = kinds.get(self.kind, self.kind)
        return f"{families[self.family]}, {kind}, {backbone}{weights}"
