"""UPerNet (arXiv 1807.10221) as a semantic segmentation head of Detectron2.

The head and its auxiliary classifier compute what MMSegmentation 1.x's UPerHead and FCNHead do,
with as many parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, SemanticSegmentor
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from fvcore.nn import weight_init
from torch import Tensor, nn

from .norm import resolve_norm


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes [B, C, h, w] to [B, C, *size], bilinear, corners not aligned."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


@SEM_SEG_HEADS_REGISTRY.register()
class UPerNetHead(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid below it, and an auxiliary classifier.

    Args:
        input_shape: shapes of the backbone's features.
        in_features: names of the features to use, two or more.
        num_classes: K.
        channels: channels of all maps in the head.
        pool_scales: sides of the pooled maps, in cells.
        norm: Detectron2's name of the norm after each convolution but the classifiers.
        dropout: probability of dropping a channel before each classifier.
        ignore_value: label of pixels that the losses ignore.
        loss_weight: weight of the head's loss.
        aux_feature: name of the auxiliary classifier's feature; "": no such classifier.
        aux_channels: channels of the map before that classifier.
        aux_loss_weight: weight of its loss.
        class_weight: K weights of the classes in both losses; empty: all 1.

    Raises:
        ValueError: for fewer than two features, for a feature that the backbone does not have, and
            for a number of class weights other than 0 and K.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        norm: str = "SyncBN",
        dropout: float = 0.1,
        ignore_value: int = 255,
        loss_weight: float = 1.0,
        aux_feature: str = "res4",
        aux_channels: int = 256,
        aux_loss_weight: float = 0.4,
        class_weight: Sequence[float] = (),
    ) -> None:
        super().__init__()
        wanted = [*in_features, *([aux_feature] if aux_feature else [])]
        if len(in_features) < 2 or any(name not in input_shape for name in wanted):
            raise ValueError(
                "UPerNet needs two or more features of the backbone, which are "
                f"{', '.join(input_shape)}, got {', '.join(wanted)}"
            )
        if len(class_weight) not in (0, num_classes):
            raise ValueError(
                f"there must be a class weight for each of the {num_classes} classes, "
                f"got {len(class_weight)}"
            )
        # From the finest to the coarsest; of one stride, in the backbone's order.
        order = sorted(input_shape, key=lambda name: input_shape[name].stride)
        self.in_features = sorted(in_features, key=order.index)
        self.common_stride = input_shape[self.in_features[0]].stride
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.loss_weight, self.aux_loss_weight = loss_weight, aux_loss_weight
        self.pool_scales = tuple(pool_scales)
        self.aux_feature = aux_feature
        weights = torch.tensor(list(class_weight), dtype=torch.float32) if class_weight else None
        self.register_buffer("class_weight", weights, persistent=False)

        def conv(inputs: int, outputs: int, kernel: int) -> Conv2d:
            layer = Conv2d(
                inputs,
                outputs,
                kernel,
                padding=kernel // 2,
                bias=not norm,
                norm=get_norm(resolve_norm(norm), outputs),
                activation=F.relu,
            )
            weight_init.c2_msra_fill(layer)
            return layer

        def classifier(inputs: int) -> Conv2d:
            layer = Conv2d(inputs, num_classes, 1)
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
            return layer

        *finer, coarsest = self.in_features
        top = input_shape[coarsest].channels
        for i in range(len(self.pool_scales)):
            self.add_module(f"psp{i}", conv(top, channels, 1))
        self.psp_bottleneck = conv(top + len(self.pool_scales) * channels, channels, 3)
        # Numbered by the stride, as Detectron2's FPN does, or from 2 on, where strides repeat as
        # those of ELSA-VOLO without its pyramid do.
        self.stages = [int(math.log2(input_shape[name].stride)) for name in finer]
        if len(set(self.stages)) < len(self.stages):
            self.stages = [index + 2 for index in range(len(finer))]
        for stage, name in zip(self.stages, finer, strict=True):
            self.add_module(f"lateral{stage}", conv(input_shape[name].channels, channels, 1))
            self.add_module(f"fpn_output{stage}", conv(channels, channels, 3))
        self.fpn_bottleneck = conv(len(self.in_features) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = classifier(channels)
        if aux_feature:
            self.aux_conv = conv(input_shape[aux_feature].channels, aux_channels, 3)
            self.aux_predictor = classifier(aux_channels)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        node = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": input_shape,
            "in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "channels": node.CONVS_DIM,
            "pool_scales": node.POOL_SCALES,
            "norm": node.NORM,
            "dropout": node.DROPOUT,
            "ignore_value": node.IGNORE_VALUE,
            "loss_weight": node.LOSS_WEIGHT,
            "aux_feature": node.AUX_FEATURE,
            "aux_channels": node.AUX_CONVS_DIM,
            "aux_loss_weight": node.AUX_LOSS_WEIGHT,
            "class_weight": node.CLASS_WEIGHT,
        }

    def forward(
        self, features: Mapping[str, Tensor], targets: Any = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Computes what `SemanticSegmentor` asks of a head.

        Args:
            features: maps [B, C_i, H_i, W_i] by name.
            targets: labels [B, H, W], needed in training.

        Returns:
            In training, None and the losses. Else logits [B, K, s * H_0, s * W_0], where s is the
            stride of the finest map, and no losses.
        """
        if self.training:
            return None, self.losses(features, targets)
        logits = self.logits(features)
        return resize(logits, [self.common_stride * side for side in logits.shape[-2:]]), {}

    def logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Returns float32 logits [B, K, H_0, W_0] at the size of the finest map."""
        *finer, coarsest = (features[name] for name in self.in_features)
        maps = [self._pool(coarsest)]
        for stage, feature in zip(reversed(self.stages), reversed(finer), strict=True):
            lateral = getattr(self, f"lateral{stage}")(feature)
            maps.insert(0, lateral + resize(maps[0], lateral.shape[-2:]))
        for i, stage in enumerate(self.stages):
            maps[i] = getattr(self, f"fpn_output{stage}")(maps[i])
        size = maps[0].shape[-2:]
        merged = self.fpn_bottleneck(torch.cat([resize(level, size) for level in maps], dim=1))
        return self.predictor(self.dropout(merged)).float()

    def aux_logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Returns float32 logits [B, K, H_i, W_i] at the size of the auxiliary feature."""
        return self.aux_predictor(self.dropout(self.aux_conv(features[self.aux_feature]))).float()

    def losses(self, features: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Returns "loss_sem_seg" and, with an auxiliary classifier, "loss_sem_seg_aux"."""
        losses = {"loss_sem_seg": self.loss_weight * self._loss(self.logits(features), targets)}
        if self.aux_feature:
            loss = self._loss(self.aux_logits(features), targets)
            losses["loss_sem_seg_aux"] = self.aux_loss_weight * loss
        return losses

    def _pool(self, x: Tensor) -> Tensor:
        pooled = [
            resize(getattr(self, f"psp{i}")(F.adaptive_avg_pool2d(x, scale)), x.shape[-2:])
            for i, scale in enumerate(self.pool_scales)
        ]
        return self.psp_bottleneck(torch.cat([x, *pooled], dim=1))

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy with MMSegmentation's mean.

        It is over all pixels, ignored ones included; with class weights, it is the weighted mean of
        the pixels that are not ignored.
        """
        logits = resize(logits, targets.shape[-2:])
        weight: Any = self.class_weight
        total = F.cross_entropy(
            logits, targets, weight, ignore_index=self.ignore_value, reduction="sum"
        )
        if weight is None:
            return total / targets.numel()
        weights = weight[targets[targets != self.ignore_value]].sum()
        return total / weights.clamp(min=torch.finfo(weights.dtype).eps)


@META_ARCH_REGISTRY.register()
class WholeImageSegmentor(SemanticSegmentor):
    """`SemanticSegmentor` that resizes test logits to the size of the input (mode "whole").

    Detectron2's multiplies their size by the stride and crops, which shifts them where the stride
    does not divide the image. The head must have `logits`.
    """

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As in `SemanticSegmentor`: losses in training, else [{"sem_seg": logits [K, H, W]}]."""
        if self.training:
            return super().forward(batched_inputs)
        images = ImageList.from_tensors(
            [
                (x["image"].to(self.device) - self.pixel_mean) / self.pixel_std
                for x in batched_inputs
            ],
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )
        logits = self.sem_seg_head.logits(self.backbone(images.tensor))
        logits = resize(logits, images.tensor.shape[-2:])
        return [
            {
                "sem_seg": sem_seg_postprocess(
                    one, size, x.get("height", size[0]), x.get("width", size[1])
                )
            }
            for one, size, x in zip(logits, images.image_sizes, batched_inputs, strict=True)
        ]
