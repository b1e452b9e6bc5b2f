"""What timm 0.4.9, which trained the published classifiers, does differently from MMPretrain.

Configs name these classes by their full path, because this module needs MMPretrain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmpretrain.datasets import transforms
from mmpretrain.datasets.transforms.auto_augment import RANDAUG_POLICIES, merge_hparams
from mmpretrain.models.utils import ClsDataPreprocessor, batch_augments
from torch import Tensor


class RandAugment(transforms.RandAugment):
    """MMPretrain's RandAugment, with a random interpolation in each operation that resamples.

    Args:
        policies: a name or a list of operations.
        interpolations: equally likely choices.
        args, options: MMPretrain's other arguments.
    """

    def __init__(
        self,
        policies: str | list[dict],
        *args: Any,
        interpolations: Sequence[str] = ("bilinear", "bicubic"),
        **options: Any,
    ) -> None:
        if isinstance(policies, str):
            policies = RANDAUG_POLICIES[policies]
        variants = [
            merge_hparams(policy, dict(interpolation=interpolation))
            for interpolation in interpolations
            for policy in policies
        ]
        super().__init__(variants, *args, **options)


class Mixup(batch_augments.Mixup):
    """Mixup of each image with its counterpart in the reversed batch."""

    def mix(self, batch_inputs: Tensor, batch_scores: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] and [B, classes], mixed."""
        share = float(np.random.beta(self.alpha, self.alpha))
        return _mixed(batch_inputs, share), _mixed(batch_scores, share)


class CutMix(batch_augments.CutMix):
    """CutMix of each image with its counterpart in the reversed batch."""

    def mix(self, batch_inputs: Tensor, batch_scores: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W], modified in place, and [B, classes], mixed."""
        share = np.random.beta(self.alpha, self.alpha)
        box, share = self.cutmix_bbox_and_lam(batch_inputs.shape[-2:], share)
        top, bottom, left, right = map(int, box)
        patch = batch_inputs[..., top:bottom, left:right]
        patch.copy_(patch.flip(0))
        return batch_inputs, _mixed(batch_scores, float(share))


def _mixed(batch: Tensor, share: float) -> Tensor:
    return share * batch + (1 - share) * batch.flip(0)


class ErasingDataPreprocessor(ClsDataPreprocessor):
    """MMPretrain's ClsDataPreprocessor that erases a rectangle of some training images at the end.

    That is after normalisation and mixing. Each pixel of the rectangle gets unclipped standard
    normal noise. The rectangle covers 1/50 to 1/3 of the image, with an aspect ratio of 0.3 to 1 /
    0.3.

    Args:
        erase_prob: probability for an image.
        args, options: MMPretrain's arguments.
    """

    area, ratio, attempts = (0.02, 1 / 3), (0.3, 1 / 0.3), 10

    def __init__(self, *args: Any, erase_prob: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.erase_prob = erase_prob

    def forward(self, data: dict, training: bool = False) -> dict:
        """{"inputs": [B, C, H, W], "data_samples"} of a batch from the data loader."""
        data = super().forward(data, training)
        if training:
            for image in data["inputs"]:
                if np.random.rand() < self.erase_prob:
                    self._erase(image)
        return data

    def _erase(self, image: Tensor) -> None:
        height, width = image.shape[-2:]
        for _ in range(self.attempts):
            area = np.random.uniform(*self.area) * height * width
            ratio = math.exp(np.random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if rows < height and columns < width:
                top = np.random.randint(height - rows + 1)
                left = np.random.randint(width - columns + 1)
                image[:, top : top + rows, left : left + columns].normal_()
                return
