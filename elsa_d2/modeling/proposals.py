"""A region proposal network that trains and ranks boxes exactly as MMDetection's does."""

from __future__ import annotations

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import nms

from .boxes import MMDetBoxTransform
from .matching import MaxIoUMatcher


@PROPOSAL_GENERATOR_REGISTRY.register()
class MMDetRPN(RPN):
    """RPN (arXiv 1506.01497) with MMDetection's labels, losses and ranking.

    Labels: the best anchors of an object are positive from MODEL.RPN.MIN_POS_IOU on, with this
    object as their target. Anchors outside the image (MODEL.RPN.BOUNDARY_THRESH) or in the padding
    of the batch (MODEL.RPN.PAD_DIVISOR) are not matched. Losses are divided by the number of
    sampled anchors.

    Ranking: by probability instead of logit. In float32 neighbouring logits give one probability;
    the order of such boxes decides which one suppresses the other, and about one image in 200 would
    get other detections than in MMDetection. So everything that affects the order is MMDetection's:
    float32 probabilities (in mixed precision too), the order of the anchors, which ties keep, the
    arithmetic of boxes, and the offsets that separate levels during suppression.

    Args:
        pad_divisor: an image is padded to a multiple of it; anchors beyond are not trained.
            0: anchors in all of the batch's padding are trained.
        anchor_ratios: aspect ratios for each size. Detectron2 sorts the anchors of a position by
            size, MMDetection by ratio.
        options: as in RPN.
    """

    @configurable
    def __init__(self, *, pad_divisor: int = 0, anchor_ratios: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.pad_divisor = pad_divisor
        self.anchor_ratios = anchor_ratios

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        node = cfg.MODEL.RPN
        matcher = MaxIoUMatcher(node.IOU_THRESHOLDS, node.IOU_LABELS, node.MIN_POS_IOU)
        options = super().from_config(cfg, input_shape)
        return {
            **options,
            "anchor_matcher": matcher,
            "box2box_transform": MMDetBoxTransform(weights=node.BBOX_REG_WEIGHTS),
            "pad_divisor": node.PAD_DIVISOR,
            "anchor_ratios": len(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0]),
        }

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns labels [R] (1, 0, or -1: not trained) and target boxes [R, 4] of each image.

        Args:
            anchors: boxes of L levels, R in all.
            gt_instances: N images' objects, with ``gt_boxes``.
        """
        everything = Boxes.cat(anchors)
        labels, targets = [], []
        for instances in gt_instances:
            trained = self._trained(anchors, instances.image_size)
            (label,), (target,) = super().label_and_sample_anchors(
                [everything[trained]], [instances]
            )
            labels.append(label.new_full(trained.shape, -1).masked_scatter(trained, label))
            boxes = target.new_zeros(len(trained), 4)
            targets.append(boxes.masked_scatter(trained[:, None], target))
        return labels, targets

    def _trained(self, anchors: list[Boxes], size: tuple[int, int]) -> Tensor:
        """Returns a mask [R] of the anchors that an image of (height, width) trains."""
        everything = Boxes.cat(anchors)
        trained = torch.ones(len(everything), dtype=torch.bool, device=everything.device)
        if self.anchor_boundary_thresh >= 0:
            trained &= everything.inside_box(size, self.anchor_boundary_thresh)
        if self.pad_divisor:
            generator = self.anchor_generator
            cells = torch.cat(
                [
                    level.get_centers() - generator.offset * stride
                    for level, stride in zip(anchors, generator.strides, strict=True)
                ]
            )
            height, width = (math.ceil(side / self.pad_divisor) * self.pad_divisor for side in size)
            # Cells begin at whole pixels up to rounding.
            trained &= (cells.round() < cells.new_tensor([width, height])).all(1)
        return trained

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Returns "loss_rpn_cls" and "loss_rpn_loc", averaged over the sampled anchors.

        As in MMDetection, each image counts at least one positive and one negative anchor.
        """
        losses = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        labels = torch.stack(gt_labels)
        sampled = sum((labels == kind).sum(1).clamp(min=1).sum() for kind in (0, 1))
        most = self.batch_size_per_image * len(gt_labels)
        return {name: loss * (most / sampled) for name, loss in losses.items()}

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Returns the best ``proposal_boxes`` of each image with ``objectness_logits``, best first.

        Boxes and scores that are not finite are dropped; in training the losses show them.

        Args:
            anchors: boxes of L levels.
            pred_objectness_logits: L of [N, A_i].
            pred_anchor_deltas: L of [N, A_i, 4].
            image_sizes: (height, width) of N images, to which boxes are clipped.
        """
        with torch.no_grad():
            return [
                self._best(
                    [self._by_ratio(level.tensor) for level in anchors],
                    [self._by_ratio(logits[i]) for logits in pred_objectness_logits],
                    [self._by_ratio(deltas[i]) for deltas in pred_anchor_deltas],
                    size,
                )
                for i, size in enumerate(image_sizes)
            ]

    def _by_ratio(self, values: Tensor) -> Tensor:
        """Sorts the values [A, ...] of a level's anchors into MMDetection's order."""
        sizes = self.anchor_generator.num_anchors[0] // self.anchor_ratios
        grid = values.unflatten(0, (-1, sizes, self.anchor_ratios))
        return grid.transpose(1, 2).flatten(0, 2)

    def _best(
        self,
        anchors: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        size: tuple[int, int],
    ) -> Instances:
        """Proposals of one image from anchors [A_i, 4], logits [A_i] and deltas [A_i, 4]."""
        most = self.pre_nms_topk[self.training]
        # Of a whole level at once: how a vectorized sigmoid rounds depends on the position.
        chances = [level.float().sigmoid() for level in logits]
        tops = [_order(level)[:most] if most < len(level) else slice(None) for level in chances]
        anchor, delta, logit, probability = (
            torch.cat([x[top] for x, top in zip(levels, tops, strict=True)])
            for levels in (anchors, deltas, logits, chances)
        )
        box = self.box2box_transform.apply_deltas(delta, anchor)
        lengths = torch.tensor([min(most, len(level)) for level in chances])
        level = torch.arange(len(lengths)).repeat_interleave(lengths).to(box)
        finite = box.isfinite().all(1) & logit.isfinite()
        clipped = Boxes(box[finite])
        clipped.clip(size)
        large = clipped.nonempty(self.min_box_size)
        box, valid = clipped.tensor[large], finite.nonzero().flatten()[large]
        kept = _suppress(box, probability[valid], level[valid], self.nms_thresh)
        kept = kept[: self.post_nms_topk[self.training]]
        return Instances(
            size, proposal_boxes=Boxes(box[kept]), objectness_logits=logit[valid][kept]
        )


def _order(probabilities: Tensor) -> Tensor:
    """Indices in descending order of probability."""
    return probabilities.sort(descending=True).indices


def _suppress(boxes: Tensor, probabilities: Tensor, levels: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes [N, 4] that survive NMS within their level, most probable first."""
    if not len(boxes):
        return levels.long()
    apart = boxes + (levels * (boxes.max() + 1))[:, None]
    order = _order(probabilities)
    # Ranks are distinct, so that NMS has no ties to break.
    ranks = torch.arange(len(order), 0, -1, device=boxes.device, dtype=torch.float)
    return order[nms(apart[order].float(), ranks, threshold)]
