"""The layers of `Detector`, with MMDetection's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from elsa_core.weights.shapes import HeadSizes

# Sides of pooled boxes.
BOX_SIZE, MASK_SIZE = 7, 14


class ConvModule(nn.Module):
    """Convolution, norm and ReLU, with the names of mmcv's class; ``norm``: "", "bn" or "gn"."""

    def __init__(self, dim: int, out: int, size: int, norm: str = "", relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, size, padding=size // 2, bias=not norm)
        self.norm, self.relu = norm, relu
        if norm:
            self.add_module(norm, nn.BatchNorm2d(out) if norm == "bn" else nn.GroupNorm(32, out))

    def fuse(self) -> None:
        """Makes batch norm, which PyTorch cannot export for unknown numbers of boxes, a part of the
        convolution."""
        if self.norm == "bn":
            norm: Any = self.bn
            self.conv = fuse_conv_bn_eval(self.conv.eval(), norm.eval())
            self.norm = ""
            del self.bn

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = getattr(self, self.norm)(x) if self.norm else x
        return x.relu() if self.relu else x


class FPN(nn.Module):
    """Feature pyramid (arXiv 1612.03144): maps [B, C_i, H_i, W_i] -> one more, of C channels."""

    def __init__(self, dims: Sequence[int], channels: int, norm: str) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(
            ConvModule(dim, channels, 1, norm, relu=False) for dim in dims
        )
        self.fpn_convs = nn.ModuleList(
            ConvModule(channels, channels, 3, norm, relu=False) for _ in dims
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for index in range(len(levels) - 1, 0, -1):
            above = F.interpolate(levels[index], scale_factor=2.0, mode="nearest")
            levels[index - 1] = levels[index - 1] + above
        levels = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


class RPNHead(nn.Module):
    """Logits [B, A, H, W] and deltas [B, 4A, H, W] of the anchors of a map [B, C, H, W]."""

    def __init__(self, channels: int, anchors: int) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, anchors, 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * anchors, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.rpn_conv(x).relu()
        return self.rpn_cls(x), self.rpn_reg(x)


class BoxHead(nn.Module):
    """Class logits [R, K + 1] and deltas [R, K, 4] of pooled boxes [R, C, 7, 7]."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        assert sizes.channels and sizes.fc_dim and sizes.num_classes
        dim = sizes.channels
        self.shared_convs = nn.ModuleList()
        for _ in range(sizes.box_convs):
            self.shared_convs.append(ConvModule(dim, sizes.box_conv_dim or 0, 3, "bn"))
            dim = sizes.box_conv_dim or 0
        dim *= BOX_SIZE**2
        self.shared_fcs = nn.ModuleList()
        for _ in range(sizes.box_fcs):
            self.shared_fcs.append(nn.Linear(dim, sizes.fc_dim))
            dim = sizes.fc_dim
        self.fc_cls = nn.Linear(dim, sizes.num_classes + 1)
        self.fc_reg = nn.Linear(dim, 4 * sizes.num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.shared_convs:
            x = conv(x)
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = layer(x).relu()
        return self.fc_cls(x), self.fc_reg(x).unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Mask logits [R, K, 28, 28] of pooled boxes [R, C, 14, 14]."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        assert sizes.channels and sizes.mask_dim and sizes.num_classes
        dims = [sizes.channels, *[sizes.mask_dim] * sizes.mask_convs]
        self.convs = nn.ModuleList(
            ConvModule(dim, sizes.mask_dim, 3) for dim in dims[: sizes.mask_convs]
        )
        self.upsample = nn.ConvTranspose2d(dims[-1], sizes.mask_dim, 2, stride=2)
        self.conv_logits = nn.Conv2d(sizes.mask_dim, sizes.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(self.upsample(x).relu())


class RoIHead(nn.Module):
    """The heads of each stage: one, or a cascade's; without mask heads in Faster R-CNN."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.bbox_head = nn.ModuleList(BoxHead(sizes) for _ in range(sizes.stages))
        masked = sizes.stages if sizes.mask_dim else 0
        self.mask_head = nn.ModuleList(MaskHead(sizes) for _ in range(masked))
