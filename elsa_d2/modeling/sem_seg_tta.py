"""Test-time augmentation of segmentors: several scales, and flipped images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elsa_d2.data.safe_loading import read_image, to_tensor
from elsa_d2.data.sem_seg_augmentation import ResizeToFit


class SegmentorWithTTA(nn.Module):
    """Averages class probabilities over several scales and, optionally, flipped images.

    Each image is resized to multiples of INPUT.SEM_SEG.SCALE. Logits are resized to the size of the
    image before the softmax, as in MMSegmentation's SegTTAModel.

    Args:
        cfg: a config with TEST.AUG, INPUT.SEM_SEG and INPUT.FORMAT.
        model: a `SemanticSegmentor`.
        ratios: multiples of the scale; None: TEST.AUG.RATIOS.
        flip: whether to add flipped images; None: TEST.AUG.FLIP.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        ratios: Sequence[float] | None = None,
        flip: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.training = model.training  # which an evaluation restores
        self.image_format = cfg.INPUT.FORMAT
        ratios = cfg.TEST.AUG.RATIOS if ratios is None else ratios
        self.resizes = [ResizeToFit(cfg.INPUT.SEM_SEG.SCALE, (ratio, ratio)) for ratio in ratios]
        mirrored = cfg.TEST.AUG.FLIP if flip is None else flip
        self.flips = (False, True) if mirrored else (False,)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """As the model's, but reads images from "file_name" and returns probabilities."""
        return [{"sem_seg": self._mean(x)} for x in batched_inputs]

    def _mean(self, entry: dict[str, Any]) -> Tensor:
        image = read_image(entry["file_name"], self.image_format)
        height, width = image.shape[:2]
        total: Any = 0
        for resize in self.resizes:
            resized = to_tensor(resize.get_transform(image).apply_image(image))
            for flip in self.flips:
                one = {
                    **entry,
                    "image": resized.flip(-1) if flip else resized,
                    "height": height,
                    "width": width,
                }
                probabilities = self.model([one])[0]["sem_seg"].softmax(dim=0)
                total = total + (probabilities.flip(-1) if flip else probabilities)
        return total / (len(self.resizes) * len(self.flips))


def at_test_ratios(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Returns a `SemanticSegmentor` that is evaluated at TEST.SEM_SEG_RATIOS."""
    ratios = list(cfg.TEST.SEM_SEG_RATIOS)
    if isinstance(model, SegmentorWithTTA) or ratios == [1.0]:
        return model
    return SegmentorWithTTA(cfg, model, ratios, flip=False)
