"""Reads the settings of Detectron2's detectors."""

from __future__ import annotations

from typing import Any

from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN, StandardROIHeads
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
)
from torch import Tensor

from elsa_d2.modeling.backbone import MMDetFPN
from elsa_d2.modeling.boxes import MMDetAnchorGenerator, MMDetBoxTransform
from elsa_d2.modeling.cascade import (
    ClassSpecificCascadeROIHeads,
    StageMaskHeads,
    TolerantOutputLayers,
)
from elsa_d2.modeling.heads import (
    Float32OutputLayers,
    Float32ROIAlign,
    MMDetBoxHead,
    MMDetMaskHead,
    MMDetROIHeads,
)
from elsa_d2.modeling.proposals import MMDetRPN
from elsa_tools.predict.inferencer import Inferencer

from .detector import Settings
from .heads import BOX_SIZE, MASK_SIZE
from .parts import at_least, check, check_layers, only, stages


def read_settings(inferencer: Inferencer) -> tuple[Settings, int]:
    """The settings, and how many anchor sizes a level has.

    Raises UsageError for parts that `Detector` does not have.
    """
    model = inferencer.model
    check("the model", type(model), GeneralizedRCNN)
    check("the backbone", type(model.backbone), MMDetFPN, FPN)
    check("the pyramid's sum (MODEL.FPN.FUSE_TYPE)", model.backbone._fuse_type, "sum")
    check("the pyramid's top", type(model.backbone.top_block), LastLevelMaxPool)
    rpn, heads = model.proposal_generator, model.roi_heads
    check("the proposal generator", type(rpn), MMDetRPN, RPN)
    check("the anchors", type(rpn.anchor_generator), MMDetAnchorGenerator, DefaultAnchorGenerator)
    check("MODEL.ANCHOR_GENERATOR.OFFSET", rpn.anchor_generator.offset, 0.0)
    check("the heads", type(heads), MMDetROIHeads, StandardROIHeads, ClassSpecificCascadeROIHeads)
    check("MODEL.KEYPOINT_ON", heads.keypoint_on, False)
    if heads.mask_on and isinstance(heads, ClassSpecificCascadeROIHeads):
        check("the mask heads", type(heads.mask_head), StageMaskHeads)
    predictors, box_heads = stages(heads.box_predictor), stages(heads.box_head)
    for predictor, box_head in zip(predictors, box_heads, strict=True):
        known = (Float32OutputLayers, TolerantOutputLayers, FastRCNNOutputLayers)
        check("the box predictor", type(predictor), *known)
        check("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", predictor.use_sigmoid_ce, False)
        check("the box head", type(box_head), MMDetBoxHead, FastRCNNConvFCHead)
    for mask_head in stages(heads.mask_head) if heads.mask_on else []:
        check("the mask head", type(mask_head), MMDetMaskHead, MaskRCNNConvUpsampleHead)
    levels = model.backbone._out_features
    check("MODEL.RPN.IN_FEATURES", list(rpn.in_features), levels)
    check("MODEL.ROI_HEADS.IN_FEATURES", list(heads.box_in_features), levels[:-1])
    if heads.mask_on:
        check("MODEL.ROI_HEADS.IN_FEATURES", list(heads.mask_in_features), levels[:-1])
    for name, layer in model.backbone.named_children():
        if name != "bottom_up":
            check_layers(name, layer)
    check_layers("rpn_head", rpn.rpn_head)
    check_layers("roi_heads", heads)
    last = predictors[-1]
    at_least("MODEL.RPN.PRE_NMS_TOPK_TEST", rpn.pre_nms_topk[False], 1)
    at_least("MODEL.RPN.POST_NMS_TOPK_TEST", rpn.post_nms_topk[False], 1)
    at_least("TEST.DETECTIONS_PER_IMAGE", last.test_topk_per_image, 1)
    transforms = [rpn.box2box_transform, *(item.box2box_transform for item in predictors)]
    kind = only("the box transform", [type(transform) for transform in transforms])
    check("the box transform", kind, MMDetBoxTransform, Box2BoxTransform)
    sizes = inferencer.cfg.MODEL.ANCHOR_GENERATOR.SIZES  # type: ignore[attr-defined]
    anchor_sizes = only("the number of sizes in MODEL.ANCHOR_GENERATOR.SIZES", [*map(len, sizes)])
    cells = [_by_ratio(cell, anchor_sizes) for cell in rpn.anchor_generator.cell_anchors]
    mean, std = inferencer.normalisation()
    settings = Settings(
        mean=tuple(mean),
        std=tuple(std),
        anchors=tuple(tuple(map(tuple, cell.tolist())) for cell in cells),
        strides=tuple(rpn.anchor_generator.strides),
        rank="probability" if type(rpn) is MMDetRPN else "logit",
        least_side=rpn.min_box_size,
        proposals_per_level=rpn.pre_nms_topk[False],
        proposals=rpn.post_nms_topk[False],
        proposal_iou=rpn.nms_thresh,
        clamp=only("the box transforms' clamp", [item.scale_clamp for item in transforms]),
        clamp_both=kind is MMDetBoxTransform,
        rpn_deviations=_deviations(transforms[0]),
        deviations=tuple(map(_deviations, transforms[1:])),
        box_samples=_samples(heads.box_pooler, BOX_SIZE),
        mask_samples=_samples(heads.mask_pooler, MASK_SIZE) if heads.mask_on else 0,
        score=last.test_score_thresh,
        iou=last.test_nms_thresh,
        detections=last.test_topk_per_image,
    )
    return settings, anchor_sizes


def _deviations(transform: Any) -> tuple[float, ...]:
    return tuple(1 / weight for weight in transform.weights)


def _by_ratio(cell: Tensor, sizes: int) -> Tensor:
    """Anchors [A, 4] around a position, sorted by ratio as in MMDetection instead of by size."""
    return cell.unflatten(0, (sizes, -1)).transpose(0, 1).flatten(0, 1)


def _samples(pooler: ROIPooler, size: int) -> int:
    """RoIAlign's samples of all levels."""
    check("the pooled size", tuple(pooler.output_size), (size, size))
    check("the level of boxes of 224 pixels", pooler.canonical_level, 4)
    check("the size of level 4", pooler.canonical_box_size, 224)
    for level in pooler.level_poolers:
        check("the pooler", type(level), Float32ROIAlign, ROIAlign)
        check("the pooler's alignment (POOLER_TYPE ROIAlignV2)", level.aligned, True)
    samples: int = only("POOLER_SAMPLING_RATIO", [x.sampling_ratio for x in pooler.level_poolers])
    return samples
