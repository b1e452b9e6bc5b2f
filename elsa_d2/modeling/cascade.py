"""The heads of the published Cascade Mask R-CNN models with ELSA-Swin.

Cascade R-CNN (arXiv 1712.00726) as Swin's detectors use it: class-specific box regression, a mask
head for each stage, and losses on decoded boxes.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    select_foreground_proposals,
)
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from elsa_core.runtime.errors import UsageError

from .boxes import MMDetBoxTransform
from .heads import Float32OutputLayers, Float32Pooling
from .matching import ProposalMatcher

Features = dict[str, Tensor]
Predictions = tuple[Tensor, Tensor]


class TolerantOutputLayers(Float32OutputLayers):
    """Float32OutputLayers whose box loss is NaN for deltas with NaN; fvcore's would assert."""

    def losses(self, predictions: Predictions, proposals: list[Instances]) -> dict[str, Tensor]:
        logits, deltas = predictions
        if bool(deltas.isfinite().all()):
            return super().losses(predictions, proposals)
        found = super().losses((logits, _zeros_for_nan(deltas)), proposals)
        return {**found, "loss_box_reg": found["loss_box_reg"] + (deltas * 0).sum()}


class StageMaskHeads(nn.ModuleList):
    """A mask head for each stage; at test time, one module that averages their masks."""

    def forward(self, x: Tensor, instances: list[Instances]) -> list[Instances]:
        """Sets ``pred_masks`` [R_i, 1, M, M], probabilities, from features x [R, C, h, w]."""
        stages = []
        for head in self:
            head(x, instances)
            stages.append([item.pred_masks for item in instances])
        for item, masks in zip(instances, zip(*stages, strict=True), strict=True):
            item.pred_masks = torch.stack(masks).mean(0)
        return instances


@ROI_HEADS_REGISTRY.register()
class ClassSpecificCascadeROIHeads(Float32Pooling, CascadeROIHeads):
    """CascadeROIHeads with class-specific box regression and a mask head for each stage.

    Other differences from Detectron2's: each stage samples its boxes again, with the ground truth,
    and weights its losses (ROI_BOX_CASCADE_HEAD.LOSS_WEIGHTS) instead of scaling gradients. At test
    time the class logits of the stages are averaged, not their probabilities.
    """

    @configurable
    def __init__(self, *, stage_loss_weights: list[float], **options: Any) -> None:
        super().__init__(**options)
        self.stage_loss_weights = list(stage_loss_weights)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        node, name = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cls.__name__
        if cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise UsageError(
                f"{name} needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG False, got True "
                "(CascadeROIHeads is the one for True)"
            )
        if cfg.MODEL.KEYPOINT_ON:
            raise UsageError(f"{name} has no keypoint head, got MODEL.KEYPOINT_ON True")
        stages = [len(node.IOUS), len(node.BBOX_REG_WEIGHTS), len(node.LOSS_WEIGHTS)]
        if len(set(stages)) > 1:
            raise UsageError(
                "MODEL.ROI_BOX_CASCADE_HEAD must have as many IOUS as BBOX_REG_WEIGHTS and "
                f"LOSS_WEIGHTS, got {', '.join(map(str, stages))}"
            )
        if [node.IOUS[0]] != list(cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS):
            raise UsageError(
                "MODEL.ROI_HEADS.IOU_THRESHOLDS must be the first of MODEL.ROI_BOX_CASCADE_HEAD."
                f"IOUS {list(node.IOUS)}, got {list(cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS)}"
            )
        return {**super().from_config(cfg, input_shape), "stage_loss_weights": node.LOSS_WEIGHTS}

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        node = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        usual = super(CascadeROIHeads, cls)._init_box_head  # StandardROIHeads'
        parts = [usual(cfg, input_shape) for _ in node.IOUS]
        heads = [part["box_head"] for part in parts]
        return {
            "box_in_features": parts[0]["box_in_features"],
            "box_pooler": parts[0]["box_pooler"],
            "box_heads": heads,
            "box_predictors": [
                TolerantOutputLayers(
                    cfg, head.output_shape, box2box_transform=MMDetBoxTransform(weights=weights)
                )
                for head, weights in zip(heads, node.BBOX_REG_WEIGHTS, strict=True)
            ],
            "proposal_matchers": [_matcher(cfg, iou) for iou in node.IOUS],
        }

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        if not cfg.MODEL.MASK_ON:
            return {}
        usual = super()._init_mask_head
        parts = [usual(cfg, input_shape) for _ in cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS]
        return {**parts[0], "mask_head": StageMaskHeads(part["mask_head"] for part in parts)}

    def forward(
        self,
        images: ImageList,
        features: Features,
        proposals: list[Instances],
        targets: Any = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As `ROIHeads.forward`; names the losses loss_{cls,box_reg,mask}_stage{k}."""
        if not self.training:
            return super().forward(images, features, proposals)
        losses: dict[str, Tensor] = {}
        for stage, weight in enumerate(self.stage_loss_weights):
            with get_event_storage().name_scope(f"stage{stage}"):
                proposals = self._sample(stage, proposals, targets)
                predictions = self._run_stage(features, proposals, stage)
                found = self.box_predictor[stage].losses(predictions, proposals)
                found.update(self._mask_losses(stage, features, proposals))
            losses.update({f"{name}_stage{stage}": weight * found[name] for name in found})
            if stage + 1 < self.num_cascade_stages:
                proposals = self._refine(stage, predictions, proposals)
        return proposals, losses

    def _forward_box(
        self, features: Features, proposals: list[Instances], targets: None = None
    ) -> list[Instances]:
        """Returns the detections of the last stage, scored by the mean logits of all stages."""
        *earlier, last = range(self.num_cascade_stages)
        logits = []
        for stage in earlier:
            predictions = self._run_stage(features, proposals, stage)
            logits.append(predictions[0])
            proposals = self._refine(stage, predictions, proposals)
        final, deltas = self._run_stage(features, proposals, last)
        mean = torch.stack([*logits, final]).mean(0)
        detections, _ = self.box_predictor[last].inference((mean, deltas), proposals)
        return detections

    def _run_stage(self, features: Features, proposals: list[Instances], stage: int) -> Predictions:
        """Returns class logits [R, K+1] and box deltas [R, K*4] of the proposals of all images."""
        maps = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(maps, [item.proposal_boxes for item in proposals])
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _mask_losses(
        self, stage: int, features: Features, proposals: list[Instances]
    ) -> dict[str, Tensor]:
        if not self.mask_on:
            return {}
        proposals, _ = select_foreground_proposals(proposals, self.num_classes)
        maps = [features[name] for name in self.mask_in_features]
        pooled = self.mask_pooler(maps, [item.proposal_boxes for item in proposals])
        return self.mask_head[stage](pooled, proposals)

    def _sample(
        self, stage: int, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """`label_and_sample_proposals` with the matcher of the stage; marks ground-truth boxes."""
        flagged = []
        for items, value in ((proposals, 0), (targets, 1)):
            copies = [Instances(item.image_size, **item.get_fields()) for item in items]
            for copy in copies:
                device = next(iter(copy.get_fields().values())).device
                copy.is_target = torch.full((len(copy),), value, dtype=torch.bool, device=device)
            flagged.append(copies)
        usual = self.proposal_matcher
        self.proposal_matcher = self.proposal_matchers[stage]
        try:
            return self.label_and_sample_proposals(*flagged)
        finally:
            self.proposal_matcher = usual

    @torch.no_grad()
    def _refine(
        self, stage: int, predictions: Predictions, proposals: list[Instances]
    ) -> list[Instances]:
        """Returns the proposals of the next stage: boxes regressed for their class.

        The class is the most likely foreground class or, in training, that of the matched target.
        In training, ground-truth boxes are dropped.
        """
        logits, deltas = predictions
        classes = logits[:, :-1].argmax(1)
        if self.training:
            deltas = _zeros_for_nan(deltas)  # the losses show NaN, Boxes would fail on it
            known = torch.cat([item.gt_classes for item in proposals])
            classes = torch.where(known == self.num_classes, classes, known)
        rows = torch.arange(len(deltas), device=deltas.device)
        deltas = deltas.unflatten(1, (-1, 4))[rows, classes]
        boxes = Boxes.cat([item.proposal_boxes for item in proposals]).tensor
        boxes = self.box_predictor[stage].box2box_transform.apply_deltas(deltas, boxes)
        refined = []
        for item, moved in zip(proposals, boxes.split([len(p) for p in proposals]), strict=True):
            if self.training:
                moved = moved[~item.is_target]
            new = Instances(item.image_size, proposal_boxes=Boxes(moved))
            new.proposal_boxes.clip(item.image_size)
            # Sampling with the ground truth needs this field and ignores its value.
            new.objectness_logits = moved.new_zeros(len(moved))
            refined.append(new)
        return refined


def _zeros_for_nan(deltas: Tensor) -> Tensor:
    """Replaces NaN and infinity by 0."""
    return deltas.nan_to_num(0, 0, 0)


def _matcher(cfg: CfgNode, iou: float) -> Matcher | ProposalMatcher:
    """The matcher of a stage whose proposals are positive from this IoU on."""
    matcher = Matcher([iou], [0, 1], allow_low_quality_matches=False)
    return ProposalMatcher(matcher) if cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT else matcher
