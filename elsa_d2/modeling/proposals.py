"""A region proposal network that is trained and ranks its boxes exactly as MMDetection's does."""

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

    Labels: the best anchors of a box are positive from MODEL.RPN.MIN_POS_IOU on, and then this box
    is their target. Anchors outside the image (MODEL.RPN.BOUNDARY_THRESH) or in the padding of the
    batch (MODEL.RPN.PAD_DIVISOR) are left out before the matching. Losses are divided by the number
    of anchors sampled.

    Ranking is by probability instead of its logarithmic odds. In float32 a probability merges
    neighbouring odds. Whoever of two such boxes comes first suppresses the other one, and then
    other boxes survive: about one image in 200 of a model trained in one framework would give other
    detections in the other one. So whatever has an influence on the order is as in MMDetection:
    probabilities, the order of the anchors, which equal ones keep, the arithmetic of boxes, and
    boxes of other levels that are moved aside for the suppression, and so rounded. In mixed
    precision, too, a probability is that of a float32 number.

    Args:
        pad_divisor: an image's own padding ends at the next multiple of it; anchors beyond are not
            trained. 0: anchors in all of the batch's padding are.
        anchor_ratios: of the anchors of each size. Detectron2 has the anchors of a position in the
            order of their sizes, MMDetection of their ratios.
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
        """Labels [R], 1, 0 or -1 for not trained, and target boxes [R, 4] of each image.

        Args:
            anchors: boxes of each of L levels, R in all.
            gt_instances: with ``gt_boxes``, of N images.
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
        """Which anchors [R] of an image of (height, width) are trained."""
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
            # Cells begin at whole pixels, but for rounding.
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
        """ "loss_rpn_cls" and "loss_rpn_loc", means over the anchors sampled.

        MMDetection counts at least one positive and one negative anchor of each image.
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
        """The best boxes of each image, best first, with ``proposal_boxes`` and
        ``objectness_logits``.

        Args:
            anchors: boxes of each of L levels.
            pred_objectness_logits: L of [N, A_i].
            pred_anchor_deltas: L of [N, A_i, 4].
            image_sizes: (height, width) of N images, to which boxes are clipped.

        Boxes and scores that are not finite are left out; a training sees them in its losses.
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
        """What a level's anchors have [A, ...], in MMDetection's order."""
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
        """Of one image, from all anchors [A_i, 4], logits [A_i] and deltas [A_i, 4] of levels."""
        most = self.pre_nms_topk[self.training]
        # Once, for all numbers of a level: a vectorised sigmoid rounds by the number's place, too.
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
    """Indices, most probable first."""
    return probabilities.sort(descending=True).indices


def _suppress(boxes: Tensor, probabilities: Tensor, levels: Tensor, threshold: float) -> Tensor:
    """Indices of boxes [N, 4] that survive those of their own level, most probable first."""
    if not len(boxes):
        return levels.long()
    apart = boxes + (levels * (boxes.max() + 1))[:, None]
    order = _order(probabilities)
    # Ranks are different numbers, so the suppression has no tie to break.
    ranks = torch.arange(len(order), 0, -1, device=boxes.device, dtype=torch.float)
    return order[nms(apart[order].float(), ranks, threshold)]
