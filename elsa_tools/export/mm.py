"""Reads the settings of MMDetection's detectors."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmdet.models import (
    FPN,
    CascadeRCNN,
    CascadeRoIHead,
    ConvFCBBoxHead,
    FasterRCNN,
    FCNMaskHead,
    MaskRCNN,
    RPNHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
    SingleRoIExtractor,
    StandardRoIHead,
)
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder

from elsa_mm.detection import (
    FastMaskHead,
    Float32BBoxHead,
    Float32RoIExtractor,
    Float32RPNHead,
    InitializedCascadeRoIHead,
)
from elsa_tools.predict.inferencer import Inferencer

from .detector import DIVISOR, FINEST, Settings
from .heads import BOX_SIZE, MASK_SIZE
from .parts import at_least, check, check_layers, only, stages

BOX_HEADS = (Float32BBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead, ConvFCBBoxHead)


def read_settings(inferencer: Inferencer) -> tuple[Settings, int]:
    """The settings, and how many anchor sizes a level has.

    Raises UsageError for parts that `Detector` does not have.
    """
    model = inferencer.model
    check("the model", type(model), FasterRCNN, MaskRCNN, CascadeRCNN)
    preprocessor = model.data_preprocessor
    check("data_preprocessor.pad_size_divisor", preprocessor.pad_size_divisor, DIVISOR)
    check("data_preprocessor.pad_value", preprocessor.pad_value, 0)
    neck, rpn, heads = model.neck, model.rpn_head, model.roi_head
    check("the neck", type(neck), FPN)
    check("neck.add_extra_convs", neck.add_extra_convs, False)
    check("neck.start_level", neck.start_level, 0)
    check("neck.num_outs", neck.num_outs, len(neck.in_channels) + 1)
    check("neck.upsample_cfg", dict(neck.upsample_cfg), {"mode": "nearest"})
    check("rpn_head", type(rpn), Float32RPNHead, RPNHead)
    check("rpn_head.num_convs", rpn.num_convs, 1)
    check("rpn_head.loss_cls.use_sigmoid", rpn.use_sigmoid_cls, True)
    check("the anchors", type(rpn.prior_generator), AnchorGenerator)
    check("the anchors' centre", rpn.prior_generator.center_offset, 0.0)
    strides = [(4 * 2**level,) * 2 for level in range(len(neck.in_channels) + 1)]
    check("the anchors' strides", [tuple(pair) for pair in rpn.prior_generator.strides], strides)
    check("roi_head", type(heads), StandardRoIHead, CascadeRoIHead, InitializedCascadeRoIHead)
    boxes, masks = stages(heads.bbox_head), stages(heads.mask_head) if model.with_mask else []
    for box_head in boxes:
        check("bbox_head", type(box_head), *BOX_HEADS)
        check("bbox_head.custom_cls_channels", box_head.custom_cls_channels, False)
        check("the branches of bbox_head", len(box_head.cls_convs) + len(box_head.reg_convs), 0)
    for mask_head in masks:
        check("mask_head", type(mask_head), FastMaskHead, FCNMaskHead)
        check("mask_head.upsample_cfg.type", mask_head.upsample_method, "deconv")
    _check_layers("neck", neck, active=False)
    _check_layers("rpn_head", rpn, active=True)
    _check_layers("roi_head", heads, active=True)
    test = model.test_cfg
    check("test_cfg.rpn.nms.type", test.rpn.nms.type, "nms")
    check("test_cfg.rcnn.nms.type", test.rcnn.nms.type, "nms")
    for name, nms in (("rpn", test.rpn.nms), ("rcnn", test.rcnn.nms)):
        other = sorted(nms.keys() - {"type", "iou_threshold"})
        check(f"the options of test_cfg.{name}.nms", other, [])
    at_least("test_cfg.rpn.nms_pre", test.rpn.nms_pre, 1)
    at_least("test_cfg.rpn.max_per_img", test.rpn.max_per_img, 1)
    at_least("test_cfg.rcnn.max_per_img", test.rcnn.max_per_img, 1)
    if masks:
        at_least("test_cfg.rcnn.mask_thr_binary", test.rcnn.mask_thr_binary, 0)
    coders = [rpn.bbox_coder, *(head.bbox_coder for head in boxes)]
    for coder in coders:
        check("bbox_coder", type(coder), DeltaXYWHBBoxCoder)
        check("bbox_coder.target_means", tuple(coder.means), (0.0,) * 4)
        check("bbox_coder.add_ctr_clamp", coder.add_ctr_clamp, False)
        check("bbox_coder.clip_border", coder.clip_border, True)
    scales = len(rpn.prior_generator.scales)
    mean, std = inferencer.normalisation()
    settings = Settings(
        mean=tuple(mean),
        std=tuple(std),
        anchors=tuple(
            tuple(map(tuple, cell.tolist())) for cell in rpn.prior_generator.base_anchors
        ),
        strides=tuple(stride for stride, _ in rpn.prior_generator.strides),
        rank="probability",
        least_side=float(test.rpn.get("min_bbox_size", -1)),
        proposals_per_level=test.rpn.nms_pre,
        proposals=test.rpn.max_per_img,
        proposal_iou=test.rpn.nms.iou_threshold,
        clamp=math.log(1000 / 16),
        clamp_both=True,
        rpn_deviations=tuple(coders[0].stds),
        deviations=tuple(tuple(coder.stds) for coder in coders[1:]),
        box_samples=_samples(heads.bbox_roi_extractor, BOX_SIZE, strides),
        mask_samples=(_samples(heads.mask_roi_extractor, MASK_SIZE, strides) if masks else 0),
        score=test.rcnn.score_thr,
        iou=test.rcnn.nms.iou_threshold,
        detections=test.rcnn.max_per_img,
        mask_threshold=test.rcnn.mask_thr_binary if masks else 0.5,
    )
    return settings, scales


def _check_layers(part: str, module: torch.nn.Module, active: bool) -> None:
    """Args: active: whether a ReLU follows the convolutions."""
    check_layers(part, module)
    for name, block in module.named_modules():
        if isinstance(block, ConvModule):
            what = f"{part}.{name}"
            check(f"{what}.order", block.order, ("conv", "norm", "act"))
            activation = type(block.activate) if block.with_activation else None
            check(f"the activation of {what}", activation, torch.nn.ReLU if active else None)


def _samples(extractors: Any, size: int, strides: list[tuple[int, int]]) -> int:
    """RoIAlign's samples of all levels and stages."""
    layers = []
    for extractor in stages(extractors):
        check("the RoI extractor", type(extractor), Float32RoIExtractor, SingleRoIExtractor)
        check("finest_scale of the RoI extractor", extractor.finest_scale, FINEST)
        wanted = [stride for stride, _ in strides[:-1]]
        check("featmap_strides of the RoI extractor", list(extractor.featmap_strides), wanted)
        layers += extractor.roi_layers
    for layer in layers:
        check("roi_layer", type(layer).__name__, "RoIAlign")
        check("roi_layer.aligned", layer.aligned, True)
        check("roi_layer.pool_mode", layer.pool_mode, "avg")
        check("roi_layer.output_size", tuple(layer.output_size), (size, size))
    samples: int = only("roi_layer.sampling_ratio", [layer.sampling_ratio for layer in layers])
    return samples
