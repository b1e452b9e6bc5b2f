"""Faster, Mask and Cascade R-CNN in plain PyTorch: what every exported detector is made of.

Both frameworks' models become a `Detector`, so that their exports are one graph. It computes what
they compute at test time (arXiv 1506.01497, 1703.06870, 1712.00726), on batches, from pixels to
detections. Parameters have MMDetection's names, with an index for the stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elsa_core import ELSASwin, ELSAVolo
from elsa_core.weights.shapes import HeadSizes
from elsa_tools.predict.executors import DETECTION, MASKS

from .heads import BOX_SIZE, FPN, MASK_SIZE, RoIHead, RPNHead
from .models import EXAMPLE, Exportable, family_of
from .paste import paste

# An image is padded to a multiple of this, the pyramid's largest stride but one.
DIVISOR = 32
# A box of twice this side goes to the pyramid's second level; what its logarithm is kept above by.
FINEST, ROUNDING = 56, 1e-6
# Of a row that holds no box.
ABSENT = -1.0


@dataclass(frozen=True)
class Settings:
    """What a detector computes with beside its tensors.

    Attributes:
        mean, std: of an RGB image with values in 0..255.
        anchors: for each level, boxes [A, 4] around a position in MMDetection's order.
        strides: pixels between the positions of each level.
        rank: "probability" as MMDetection ranks proposals, or "logit" as Detectron2 does.
        least_side: of a proposal; sides must be longer.
        proposals_per_level, proposals: kept before and after suppression at ``proposal_iou``.
        clamp: of the logarithm of a box's growth; from below, too, where ``clamp_both``.
        deviations: of box deltas (x, y, width, height), of the RPN and of each stage.
        box_samples, mask_samples: of RoIAlign in each direction of a bin; 0: as many as pixels.
        score, iou, detections: least score, suppression and number of detections of an image.
        mask_threshold: probability from which a pixel belongs to a mask.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    anchors: tuple[tuple[tuple[float, ...], ...], ...]
    strides: tuple[int, ...]
    rank: str
    least_side: float
    proposals_per_level: int
    proposals: int
    proposal_iou: float
    clamp: float
    clamp_both: bool
    rpn_deviations: tuple[float, ...]
    deviations: tuple[tuple[float, ...], ...]
    box_samples: int
    mask_samples: int
    score: float
    iou: float
    detections: int
    mask_threshold: float = 0.5


class Detector(Exportable):
    """A whole detector, one of our backbones under a feature pyramid.

    `forward` takes ``image`` [B, 3, H, W], RGB with values in 0..255, and ``size`` [B, 2], int64:
    height and width of each image; what lies outside is padding, whatever its values. It returns,
    best first and image by image, N detections: boxes [N, 4] (x1, y1, x2, y2) in pixels, scores
    [N], labels [N], the indices of their images [N], and, of a model with mask heads, mask logits
    [N, 28, 28] over the boxes.

    Args:
        normalised: whether ``image`` is normalised already.
        pasted: whether masks are pasted into the image: bool [N, H, W].
    """

    task, inputs = "detection", ("image", "size")

    def __init__(
        self,
        backbone: ELSASwin | ELSAVolo,
        sizes: HeadSizes,
        settings: Settings,
        normalised: bool = False,
        pasted: bool = False,
    ) -> None:
        super().__init__()
        assert sizes.channels and sizes.anchors
        self.settings, self.normalised, self.pasted = settings, normalised, pasted
        self.backbone = backbone
        self.neck = FPN(backbone.num_features, sizes.channels, sizes.neck_norm)
        self.rpn_head = RPNHead(sizes.channels, sizes.anchors)
        self.roi_head = RoIHead(sizes)
        masks = (MASKS,) if self.roi_head.mask_head else ()
        self.names = (*DETECTION, *masks)

    def example(self) -> tuple[Tensor, ...]:
        height, width = EXAMPLE
        return (*super().example(), torch.tensor([[height, width], [height - 7, width - 9]]))

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        return (*super().dynamic_shapes(), {0: torch.export.Dim.DYNAMIC})

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        maps = self.neck(self.features(self._padded(image, size)))
        # [B, 1, 4]: right and bottom of each image.
        limit = size.flip(1).repeat(1, 2).to(image.dtype).unsqueeze(1)
        boxes, images = self._propose(maps, limit)
        scores, labels, boxes, images = self._detect(maps, boxes, images, limit)
        if not self.roi_head.mask_head:
            return boxes, scores, labels, images
        masks = self._masks(maps, boxes, labels, images)
        if self.pasted:
            height, width = image.shape[2:]
            masks = paste(masks, boxes, height, width, self.settings.mask_threshold)
        return boxes, scores, labels, images, masks

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        """The backbone's maps of normalised images."""
        return family_of(self.backbone).forward(self.backbone, image)

    def _padded(self, image: Tensor, size: Tensor) -> Tensor:
        """The normalised images, 0 outside of them, up to a multiple of 32."""
        height, width = image.shape[2:]
        rows = torch.arange(height, device=image.device) < size[:, :1]
        columns = torch.arange(width, device=image.device) < size[:, 1:]
        if not self.normalised:
            mean, std = (
                torch.tensor(values, dtype=image.dtype, device=image.device).view(-1, 1, 1)
                for values in (self.settings.mean, self.settings.std)
            )
            image = (image - mean) / std
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        image = torch.where(inside, image, torch.zeros_like(image))
        # Written so that a symbolic size stays a multiple of the divisor.
        bottom, right = ((side + DIVISOR - 1) // DIVISOR * DIVISOR for side in (height, width))
        return F.pad(image, (0, right - width, 0, bottom - height))

    def _propose(self, maps: Sequence[Tensor], limit: Tensor) -> tuple[Tensor, Tensor]:
        """The best boxes [R, 4] of all images, and the indices of their images [R]."""
        settings = self.settings
        parts = []
        for level, x in enumerate(maps):
            logits, deltas = self.rpn_head(x)
            score = logits.permute(0, 2, 3, 1).flatten(1)
            if settings.rank == "probability":
                score = score.sigmoid()
            score, top = torch.ops.elsa.topk(score, settings.proposals_per_level)
            deltas = deltas.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
            deltas = deltas.gather(1, top.unsqueeze(-1).expand(-1, -1, 4))
            anchors = self._anchors(level, x)[top]
            boxes = self._decode(anchors, deltas, settings.rpn_deviations)
            parts.append((score, _clip(boxes, limit), torch.full_like(score, level)))
        score, boxes, levels = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        if settings.rank == "logit":
            score = score - score.amin(1, keepdim=True)
        sides = boxes[..., 2:] - boxes[..., :2]
        score = torch.where((sides > settings.least_side).all(-1), score, ABSENT)
        index, score = torch.ops.elsa.nms(
            _apart(boxes, levels, score > ABSENT),
            score,
            settings.proposal_iou,
            ABSENT / 2,
            settings.proposals,
        )
        rows = (score > ABSENT).flatten().nonzero().squeeze(1)
        boxes = boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)).flatten(0, 1)
        return boxes[rows], rows // settings.proposals

    def _anchors(self, level: int, x: Tensor) -> Tensor:
        """Of a map [B, C, H, W], in the order of its positions: [H * W * A, 4]."""
        stride = self.settings.strides[level]
        cell = torch.tensor(self.settings.anchors[level], device=x.device)
        row, column = (torch.arange(side, device=x.device) * stride for side in x.shape[2:])
        shape = (x.shape[2], x.shape[3])
        row, column = row[:, None].expand(shape), column[None].expand(shape)
        shift = torch.stack([column, row, column, row], 2).to(cell.dtype)
        return (shift.unsqueeze(2) + cell).flatten(0, 2)

    def _decode(self, boxes: Tensor, deltas: Tensor, deviations: Sequence[float]) -> Tensor:
        """Boxes moved and resized by deltas, both [..., 4]."""
        deltas = deltas * torch.tensor(deviations, device=deltas.device)
        low, high = boxes[..., :2], boxes[..., 2:]
        extent = high - low
        centre = (low + high) * 0.5 + extent * deltas[..., :2]
        most = self.settings.clamp
        growth = deltas[..., 2:].clamp(min=-most if self.settings.clamp_both else None, max=most)
        half = extent * growth.exp() * 0.5
        return torch.cat([centre - half, centre + half], -1)

    def _pool(
        self, maps: Sequence[Tensor], boxes: Tensor, images: Tensor, size: int, samples: int
    ) -> Tensor:
        """[R, C, size, size], each box from the level that suits its area."""
        sides = boxes[:, 2:] - boxes[:, :2]
        area = sides[:, 0] * sides[:, 1]
        levels = (area.sqrt() / FINEST + ROUNDING).log2().floor()
        levels = levels.clamp(0, len(self.backbone.out_indices) - 1).long()
        used = list(maps[: len(self.backbone.out_indices)])
        scales = [1 / stride for stride in self.settings.strides[: len(used)]]
        return torch.ops.elsa.roi_align(used, boxes, images, levels, scales, size, samples)

    def _detect(
        self, maps: Sequence[Tensor], boxes: Tensor, images: Tensor, limit: Tensor
    ) -> tuple[Tensor, ...]:
        """Scores [N], labels [N], boxes [N, 4] and indices of images [N] of the detections."""
        settings = self.settings
        within = limit[:, 0][images]
        stages = []
        for stage, head in enumerate(self.roi_head.bbox_head):
            pooled = self._pool(maps, boxes, images, BOX_SIZE, settings.box_samples)
            logits, deltas = head(pooled)
            stages.append(logits)
            if stage + 1 < len(self.roi_head.bbox_head):
                label = logits[:, :-1].argmax(1)[:, None, None].expand(-1, 1, 4)
                moved = self._decode(
                    boxes, deltas.gather(1, label).squeeze(1), settings.deviations[stage]
                )
                boxes = _clip(moved, within)
        mean = stages[0] if len(stages) == 1 else torch.stack(stages).mean(0)
        probabilities = mean.softmax(1)[:, :-1]
        decoded = self._decode(boxes.unsqueeze(1), deltas, settings.deviations[-1])
        decoded = _clip(decoded, within.unsqueeze(1))
        return self._select(probabilities, decoded, images, limit.shape[0])

    def _select(
        self, probabilities: Tensor, boxes: Tensor, images: Tensor, batch: int
    ) -> tuple[Tensor, ...]:
        """The detections among R boxes of K classes, [R, K] and [R, K, 4], of ``batch`` images."""
        settings = self.settings
        count, classes = probabilities.shape
        # One row of candidates for each image, the other images' are absent from it.
        own = images == torch.arange(batch, device=images.device).unsqueeze(1)
        score = torch.where(own.unsqueeze(-1), probabilities, ABSENT).flatten(1)
        label = torch.arange(classes, device=images.device).repeat(count)
        candidates = boxes.flatten(0, 1).expand(batch, -1, -1)
        present = score > settings.score
        index, best = torch.ops.elsa.nms(
            _apart(candidates, label.to(boxes.dtype).unsqueeze(0), present),
            score,
            settings.iou,
            settings.score,
            settings.detections,
        )
        rows = (best > ABSENT).flatten().nonzero().squeeze(1)
        index = index.flatten()[rows]
        found = boxes.flatten(0, 1)[index]
        return best.flatten()[rows], label[index], found, rows // settings.detections

    def _masks(
        self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor, images: Tensor
    ) -> Tensor:
        """Logits [N, 28, 28] of the boxes' classes; of a cascade, of the mean probability."""
        pooled = self._pool(maps, boxes, images, MASK_SIZE, self.settings.mask_samples)
        stages = []
        for head in self.roi_head.mask_head:
            logits = head(pooled)
            label = labels[:, None, None, None].expand(-1, 1, *logits.shape[2:])
            stages.append(logits.gather(1, label).squeeze(1))
        if len(stages) == 1:
            return stages[0]
        return torch.logit(torch.stack(stages).sigmoid().mean(0), eps=1e-6)


def _clip(boxes: Tensor, limit: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), limit)


def _apart(boxes: Tensor, groups: Tensor, present: Tensor) -> Tensor:
    """Boxes [B, N, 4] moved so far that those of different groups [B, N] never overlap.

    With the rounding of `torchvision.ops.batched_nms` and mmcv's, which both frameworks call.
    """
    coordinates = torch.where(present.unsqueeze(-1), boxes, 0.0).flatten(1)
    largest = F.pad(coordinates, (0, 1)).amax(1)  # 0 where there are no boxes
    return boxes + (groups * (largest + 1).unsqueeze(1)).unsqueeze(-1)
