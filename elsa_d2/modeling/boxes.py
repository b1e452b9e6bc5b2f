"""Anchors and boxes with MMDetection's arithmetic: the same weights give the same bits.

In the last bits alone Detectron2's differ, but a suppression keeps another box where an overlap is
rounded to the other side of its threshold: of a trained model, about one image in 20.
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
    """DefaultAnchorGenerator, in the same order, that computes in float32 as MMDetection does."""

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
    """Box2BoxTransform that limits the logarithm of shrinking as it does that of growing."""

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes [N, 4] moved by deltas [N, k*4], as [N, k*4] in pixels."""
        deltas = deltas.float()
        scaled = deltas.unflatten(1, (-1, 4)) * deltas.new_tensor([1 / w for w in self.weights])
        shift, growth = scaled.split(2, dim=2)
        low, high = boxes.to(deltas)[:, None].split(2, dim=2)
        extent = high - low
        centre = (low + high) * 0.5 + extent * shift
        half = extent * growth.clamp(-self.scale_clamp, self.scale_clamp).exp() * 0.5
        return torch.cat([centre - half, centre + half], 2).flatten(1)
