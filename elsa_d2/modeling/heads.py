"""Detectron2's heads with MMDetection's targets, arithmetic and initialization."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
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
from torch.nn.modules.utils import _pair

from elsa_core.heads import mask_logits, pools_fast, upsamples_fast
from elsa_core.linear import fast_linear

from .boxes import MMDetBoxTransform
from .matching import MaxIoUMatcher, ProposalMatcher
from .norm import resolve_norm


class Float32ROIAlign(ROIAlign):
    """ROIAlign that computes in float32 whatever the dtype of the features.

    Detectron2's converts coordinates to the dtype of the features: near 1000 pixels, float16 rounds
    them to multiples of 0.5 and bfloat16 to multiples of 4. At inference on the CPU
    `elsa::roi_align` pools the features.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pools features [B, C, H, W] at rois [R, 5] into [R, C, *output_size], in their dtype."""
        features, rois = input.float(), rois.float()
        high, wide = _pair(self.output_size)
        if self.aligned and high == wide and pools_fast(features, rois):
            images = rois[:, 0].long()
            levels, options = torch.zeros_like(images), (high, self.sampling_ratio)
            pooled = torch.ops.elsa.roi_align(
                [features], rois[:, 1:], images, levels, [self.spatial_scale], *options
            )
            return pooled.to(input.dtype)
        return super().forward(features, rois).to(input.dtype)


class Float32ROIPooler(ROIPooler):
    """ROIPooler with `Float32ROIAlign`; takes the same arguments."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.level_poolers = nn.ModuleList(map(_in_float32, self.level_poolers))


class Float32Pooling:
    """Mixin that gives the poolers of StandardROIHeads and its subclasses Float32ROIAlign."""

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
    """FastRCNNOutputLayers with float32 outputs, since half precision makes scores tie."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns class logits [R, K+1] and box deltas [R, K*4] of features [R, C]."""
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


@ROI_HEADS_REGISTRY.register()
class MMDetROIHeads(Float32Pooling, StandardROIHeads):
    """StandardROIHeads with the targets and boxes of MMDetection's Mask R-CNN, pooled in float32.

    An object claims the proposals that overlap most with it if their IoU makes them positive, even
    those that overlap more with another object. `MMDetBoxTransform` decodes the boxes.
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
    """FastRCNNConvFCHead with the linear layers of `elsa_core`, initialized by Xavier's rule.

    ``conv_norm`` "SyncBN" is `norm.SyncBatchNorm`, which works on CPUs and without boxes.
    """

    @configurable
    def __init__(self, *args: Any, conv_norm: Any = "", **options: Any) -> None:
        super().__init__(*args, conv_norm=resolve_norm(conv_norm), **options)
        for index, layer in enumerate(self.fcs):
            nn.init.xavier_uniform_(layer.weight)
            self.fcs[index] = fast_linear(layer)
            setattr(self, f"fc{index + 1}", self.fcs[index])


@ROI_MASK_HEAD_REGISTRY.register()
class MMDetMaskHead(MaskRCNNConvUpsampleHead):
    """MaskRCNNConvUpsampleHead with Kaiming initialization of its predictor and float32 logits.

    Detectron2 pastes masks at coordinates in the masks' dtype, and bfloat16 shifts these by up to
    1/256 of a box.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        nn.init.kaiming_normal_(self.predictor.weight, mode="fan_out", nonlinearity="relu")

    def layers(self, x: Tensor) -> Tensor:
        """Returns logits [R, K, 2h, 2w] of features [R, C, h, w]."""
        if not upsamples_fast(x, self.deconv, self.predictor):
            return super().layers(x).float()
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in takewhile(lambda layer: layer is not self.deconv, self):
            x = layer(x)
        return mask_logits(x, self.deconv, self.predictor)
