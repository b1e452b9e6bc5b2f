"""ELSA-Swin as a Detectron2 backbone, alone and under a pyramid; what both families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

import elsa_core
from elsa_core.backbone import StagedBackbone
from elsa_core.variants import Arch
from elsa_d2.config import backbone_options


def output_indices(names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Returns ``out_indices`` for some of the names of all outputs.

    Raises ValueError unless they are one or more of these in their order.
    """
    wanted = list(wanted)
    if not wanted or wanted != [name for name in names if name in wanted]:
        raise ValueError(
            f"out_features must be one or more of {', '.join(names)}, each once and in "
            f"ascending order, got out_features={wanted}"
        )
    return [names.index(name) for name in wanted]


class NamedMaps(StagedBackbone, Backbone):
    """Gives the maps of a backbone of `elsa_core`, a base class after this one, their names."""

    def _name_outputs(self, names: Sequence[str], strides: Sequence[int]) -> None:
        """Args: names, strides: of all outputs, whether or not they are returned."""
        self._out_features = [names[i] for i in self.out_indices]
        self._out_feature_channels = {names[i]: self.num_features[i] for i in self.out_indices}
        self._out_feature_strides = {names[i]: strides[i] for i in self.out_indices}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the feature maps [B, C_i, H_i, W_i], contiguous, of images [B, in_chans, H, W].

        OpenMMLab's adapter returns contiguous maps, too: heads then round alike in both frameworks.
        """
        maps = (feature.contiguous() for feature in super().forward(x))
        return dict(zip(self._out_features, maps, strict=True))


class ELSASwin(NamedMaps, elsa_core.ELSASwin):  # type: ignore[misc]
    """`elsa_core.ELSASwin` with named outputs and the same parameter names.

    Maps images [B, in_chans, H, W] of any size to a dict of maps [B, C_i, H_i, W_i]. Stage i is
    named "res{i+2}" and has stride 2**(i+2).

    Args:
        arch: as in `elsa_core.ELSASwin`.
        out_features: names of the stages to return, in ascending order.
        options: the other arguments of `elsa_core.ELSASwin`.

    Raises:
        ValueError: as `elsa_core.ELSASwin`, and for ``out_features`` that do not exist.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | Arch = "tiny",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        **options: Any,
    ) -> None:
        arch = Arch.from_spec(arch)
        stages = range(len(arch.depths))
        names = [f"res{stage + 2}" for stage in stages]
        super().__init__(arch, out_indices=output_indices(names, out_features), **options)
        self._name_outputs(names, [2 ** (stage + 2) for stage in stages])


class MMDetFPN(FPN):
    """FPN (arXiv 1612.03144) initialized by Xavier's rule, as in MMDetection."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for layer in [*self.lateral_convs, *self.output_convs]:
            nn.init.xavier_uniform_(layer.weight)


@BACKBONE_REGISTRY.register()
def build_elsa_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ELSASwin:
    """Builds the backbone that MODEL.ELSA_SWIN describes."""
    return ELSASwin(in_chans=input_shape.channels, **backbone_options(cfg, "ELSA_SWIN"))


@BACKBONE_REGISTRY.register()
def build_elsa_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds the backbone under MODEL.FPN, which adds a level by max pooling ("p2".."p6").

    Raises:
        ValueError: if MODEL.FPN.IN_FEATURES are not consecutive outputs of the backbone.
    """
    return feature_pyramid(cfg, build_elsa_swin_backbone(cfg, input_shape), "ELSA_SWIN")


def feature_pyramid(cfg: CfgNode, bottom_up: Backbone, node: str) -> FPN:
    """Builds MODEL.FPN on a backbone that MODEL.``node`` describes.

    Raises:
        ValueError: as `build_elsa_swin_fpn_backbone`.
    """
    wanted, available = list(cfg.MODEL.FPN.IN_FEATURES), list(bottom_up.output_shape())
    strides = [bottom_up.output_shape()[name].stride for name in wanted if name in available]
    consecutive = [2**i * strides[0] for i in range(len(wanted))] if strides else None
    if strides != consecutive:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES must be consecutive features of MODEL.{node}.OUT_FEATURES "
            f"({', '.join(available)}), got {wanted}"
        )
    top_block = LastLevelMaxPool()
    top_block.in_feature = wanted[-1].replace("res", "p")
    return MMDetFPN(
        bottom_up=bottom_up,
        in_features=wanted,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
