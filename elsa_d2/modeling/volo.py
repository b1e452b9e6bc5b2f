"""ELSA-VOLO as a Detectron2 backbone, alone and under a feature pyramid.

A reconstruction (see docs/elsa_volo.md), of which no official weights exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN

import elsa_core
from elsa_core.variants import VoloArch
from elsa_d2.config import backbone_options

from .backbone import NamedMaps, feature_pyramid, output_indices


class ELSAVolo(NamedMaps, elsa_core.ELSAVolo):  # type: ignore[misc]
    """`elsa_core.ELSAVolo` with named outputs and the same parameter names.

    Maps images [B, in_chans, H, W] of any size to a dict of maps [B, C_i, H_i, W_i]: "stage1" to
    "stage4" at strides 8, 16, 16, 16 or, with ``pyramid``, "res2" to "res5" at strides 4, 8, 16,
    32. `size_divisibility` has the images padded to multiples of 16 or 32, so that all maps cover
    the same part of the image.

    Args:
        arch: as in `elsa_core.ELSAVolo`.
        out_features: names of the maps to return, in this order; None: all.
        pyramid: as in `elsa_core.ELSAVolo`.
        options: the other arguments of `elsa_core.ELSAVolo`.

    Raises:
        ValueError: as `elsa_core.ELSAVolo`, and for ``out_features`` that do not exist.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | VoloArch = "volo_d1",
        out_features: Sequence[str] | None = None,
        pyramid: bool = False,
        **options: Any,
    ) -> None:
        names = [f"res{i + 2}" if pyramid else f"stage{i + 1}" for i in range(4)]
        wanted = names if out_features is None else out_features
        super().__init__(
            arch, out_indices=output_indices(names, wanted), pyramid=pyramid, **options
        )
        self._name_outputs(names, self.strides)

    @property
    def size_divisibility(self) -> int:
        return max(self.strides)


@BACKBONE_REGISTRY.register()
def build_elsa_volo_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ELSAVolo:
    """Builds the backbone that MODEL.ELSA_VOLO describes."""
    return ELSAVolo(in_chans=input_shape.channels, **backbone_options(cfg, "ELSA_VOLO"))


@BACKBONE_REGISTRY.register()
def build_elsa_volo_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds the backbone under MODEL.FPN, which adds a level by max pooling ("p2".."p6").

    Raises:
        ValueError: without MODEL.ELSA_VOLO.PYRAMID, or if MODEL.FPN.IN_FEATURES are not consecutive
            outputs of the backbone.
    """
    if not cfg.MODEL.ELSA_VOLO.PYRAMID:
        raise ValueError(
            "build_elsa_volo_fpn_backbone needs maps at strides 4, 8, 16, 32: "
            "MODEL.ELSA_VOLO.PYRAMID must be True, got False"
        )
    return feature_pyramid(cfg, build_elsa_volo_backbone(cfg, input_shape), "ELSA_VOLO")
