"""Anchors and boxes in MMDetection's arithmetic, equal to the last bit.

Detectron2's differ in the last bits only. But where an IoU rounds to the other side of the
threshold, NMS keeps another box: in about one image in 20 of a trained model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    BufferList,
    DefaultAnchorGenerator,
)
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor


@ANCHOR_GENERATOR_REGISTRY.register()
class MMDetAnchorGenerator(DefaultAnchorGenerator):
    """DefaultAnchorGenerator, in its order, that computes in float32 as MMDetection does."""

    def _calculate_anchors(
        self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[Sequence[float]]
    ) -> BufferList:
        cells = []
        for stride, edges, ratios in zip(self.strides, sizes, aspect_ratios, strict=True):
            scales = torch.tensor([edge / stride for edge in edges])[:, None]
            root = torch.tensor([float(ratio) for ratio in ratios]).sqrt()
            extent = torch.stack([stride * (1 / root) * scales, stride * root * scales], 2)
            half = extent.flatten(0, 1) * 0.5
            cells.append(torch.cat([-half, half], 1))
        return BufferList(cells)


class MMDetBoxTransform(Box2BoxTransform):
    """Box2BoxTransform that clamps log sizes from below as well as from above."""

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Applies deltas [N, k*4] to boxes [N, 4]; returns boxes [N, k*4], in pixels."""
        deltas = deltas.float()
        scaled = deltas.unflatten(1, (-1, 4)) * deltas.new_tensor([1 / w for w in self.weights])
        shift, growth = scaled.split(2, dim=2)
        low, high = boxes.to(deltas)[:, None].split(2, dim=2)
        extent = high - low
        centre = (low + high) * 0.5 + extent * shift
        half = extent * growth.clamp(-self.scale_clamp, self.scale_clamp).exp() * 0.5
        return torch.cat([centre - half, centre + half], 2).flatten(1)
