"""Detectron2's heads with what MMDetection's compute and begin with."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from torch import Tensor, nn

from .boxes import MMDetBoxTransform
from .matching import MaxIoUMatcher, ProposalMatcher
from .norm import resolve_norm


class Float32ROIAlign(ROIAlign):
    """ROIAlign that computes in float32, with coordinates that mixed precision does not round.

    Detectron2's own converts the coordinates to the type of the features: at 1000 pixels, float16
    rounds them to halves and bfloat16 to multiples of 4.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """[R, C, *output_size], in the type of the features [B, C, H, W], for rois [R, 5]."""
        return super().forward(input.float(), rois.float()).to(input.dtype)


class Float32Pooling:
    """Mixin for StandardROIHeads and its subclasses: their poolers use Float32ROIAlign."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        options: dict[str, Any] = super().from_config(cfg, input_shape)  # type: ignore[misc]
        for pooler in options.values():
            if isinstance(pooler, ROIPooler):
                pooler.level_poolers = nn.ModuleList(map(_in_float32, pooler.level_poolers))
        return options


def _in_float32(level: nn.Module) -> nn.Module:
    if type(level) is not ROIAlign:
        return level
    return Float32ROIAlign(
        level.output_size, level.spatial_scale, level.sampling_ratio, level.aligned
    )


class Float32OutputLayers(FastRCNNOutputLayers):
    """FastRCNNOutputLayers whose logits and deltas are float32: half precision makes ties between
    scores."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [R, K+1] and box deltas [R, K*4] of features [R, C]."""
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


@ROI_HEADS_REGISTRY.register()
class MMDetROIHeads(Float32Pooling, StandardROIHeads):
    """StandardROIHeads with targets and boxes of MMDetection's Mask R-CNN, pooling in float32.

    The proposals that overlap most with an object are trained for this object if the overlap makes
    them positive, even where they overlap more with another one. Boxes are MMDetBoxTransform's.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        node = cfg.MODEL.ROI_HEADS
        matcher = MaxIoUMatcher(node.IOU_THRESHOLDS, node.IOU_LABELS, node.IOU_THRESHOLDS[-1])
        if node.PROPOSAL_APPEND_GT:
            matcher = ProposalMatcher(matcher)
        return {**super().from_config(cfg, input_shape), "proposal_matcher": matcher}

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts = super()._init_box_head(cfg, input_shape)
        transform = MMDetBoxTransform(weights=cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
        shape = parts["box_head"].output_shape
        predictor = Float32OutputLayers(cfg, shape, box2box_transform=transform)
        return {**parts, "box_predictor": predictor}


@ROI_BOX_HEAD_REGISTRY.register()
class MMDetBoxHead(FastRCNNConvFCHead):
    """FastRCNNConvFCHead that starts from Xavier's weights.

    Its NORM "SyncBN" works on CPUs and without boxes, too.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for layer in self.fcs:
            nn.init.xavier_uniform_(layer.weight)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        norm = resolve_norm(cfg.MODEL.ROI_BOX_HEAD.NORM)
        return {**super().from_config(cfg, input_shape), "conv_norm": norm}


@ROI_MASK_HEAD_REGISTRY.register()
class MMDetMaskHead(MaskRCNNConvUpsampleHead):
    """MaskRCNNConvUpsampleHead whose predictor starts from Kaiming's weights, not near 0.

    Its logits are float32. Detectron2 pastes masks at coordinates in their own type, and bfloat16
    moves these by up to 1/256 of a box.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        nn.init.kaiming_normal_(self.predictor.weight, mode="fan_out", nonlinearity="relu")

    def layers(self, x: Tensor) -> Tensor:
        """Logits [R, K, 2h, 2w] of features [R, C, h, w]."""
        return super().layers(x).float()
