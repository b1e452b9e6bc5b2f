"""Where MMSegmentation 1.2.2 fails with our segmentors.

Configs name these classes by their full path, because `elsa_mm` needs no MMSegmentation.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import MODELS
from mmseg.models import SegDataPreProcessor
from mmseg.models.losses import CrossEntropyLoss
from torch import Tensor

from .channels import AnyChannels


@MODELS.register_module()
class WeightedCrossEntropyLoss(CrossEntropyLoss):
    """MMSegmentation's CrossEntropyLoss with class weights and pixels without a class.

    Its mean is the weighted mean over the pixels with a class. MMSegmentation 1.2.2 also looks up
    the weight of the ignored label and fails with an IndexError; later versions give this value.
    """

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        ignore_index: int = -100,
        **options: Any,
    ) -> Tensor:
        """Loss of logits [B, K, H, W] and labels [B, H, W]; the rest as in MMSegmentation."""
        softmax = not (self.use_sigmoid or self.use_mask)
        mean = (reduction_override or self.reduction) == "mean"
        if self.class_weight is not None and softmax and mean and avg_factor is None:
            weights = cls_score.new_tensor(self.class_weight)
            avg_factor = weights[label[label != ignore_index]].sum()
        return super().forward(
            cls_score, label, weight, avg_factor, reduction_override, ignore_index, **options
        )


@MODELS.register_module()
class AnyChannelsSegPreprocessor(AnyChannels, SegDataPreProcessor):
    """MMSegmentation's SegDataPreProcessor with `elsa_mm.channels.AnyChannels`."""
