"""A region proposal network that ranks its boxes exactly as MMDetection's does."""

from __future__ import annotations

import torch
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import nms


@PROPOSAL_GENERATOR_REGISTRY.register()
class ProbabilityRPN(RPN):
    """RPN (arXiv 1506.01497) that ranks boxes by probability instead of its logarithmic odds.

    In float32 a probability merges neighbouring odds. Whoever of two such boxes comes first
    suppresses the other one, and then other boxes survive: about one image in 200 of a model
    trained in one framework would give other detections in the other one. So whatever has an
    influence on the order is as in MMDetection: probabilities, their sorting, which need not be
    stable, and boxes of other levels that are moved aside for the suppression, and so rounded.
    """

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
            levels = self._decode_proposals(anchors, pred_anchor_deltas)
            return [
                self._best(
                    [boxes[i] for boxes in levels],
                    [logits[i] for logits in pred_objectness_logits],
                    size,
                )
                for i, size in enumerate(image_sizes)
            ]

    def _best(self, boxes: list[Tensor], logits: list[Tensor], size: tuple[int, int]) -> Instances:
        """Of one image, from all boxes [A_i, 4] and logits [A_i] of each level."""
        most = self.pre_nms_topk[self.training]
        # Once, for all numbers of a level: a vectorised sigmoid rounds by the number's place, too.
        chances = [level.sigmoid() for level in logits]
        tops = [_order(level)[:most] if most < len(level) else slice(None) for level in chances]
        box, logit, probability = (
            torch.cat([x[top] for x, top in zip(levels, tops, strict=True)])
            for levels in (boxes, logits, chances)
        )
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
