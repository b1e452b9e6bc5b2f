"""Parts of MMDetection's detectors with the numerics and first weights of MMDetection 2.11.

The published models were trained with that release. Configs name these classes by their full path,
because `elsa_mm` needs no MMDetection.
"""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models import CascadeRoIHead, ConvFCBBoxHead, RPNHead, SingleRoIExtractor
from mmengine.model import ModuleList
from mmengine.registry import MODELS
from mmengine.utils import apply_to
from torch import Tensor


@MODELS.register_module()
class Float32RoIExtractor(SingleRoIExtractor):
    """SingleRoIExtractor that computes in float32, also in mixed precision.

    MMDetection 3.x rounds the RoIs to the dtype of the maps. In float16 this moves them by up to
    half a pixel, and areas of more than 65504 square pixels become infinite: such RoIs are pooled
    from the coarsest level, whatever their size.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if any(getattr(layer, "use_torchvision", False) for layer in self.roi_layers):
            # mmcv imports it in the first call, where MMDetection's get_flops.py traces the import.
            import torchvision  # noqa: F401

    def forward(
        self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Features (n, C, h, w), in the maps' dtype, of RoIs (n, 5): image index and x1, y1, x2,
        y2."""
        maps = tuple(level.float() for level in feats)
        return super().forward(maps, rois, roi_scale_factor).to(feats[0].dtype)


class _Float32Outputs:
    """Predicts in float32, so that losses, scores and boxes are not rounded to half precision."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        predictions = super().forward(*args, **kwargs)  # type: ignore[misc]
        return apply_to(predictions, torch.is_tensor, Tensor.float)


@MODELS.register_module()
class Float32RPNHead(_Float32Outputs, RPNHead):
    """RPNHead with float32 scores and boxes: in half precision, scores are tied."""


@MODELS.register_module()
class Float32BBoxHead(_Float32Outputs, ConvFCBBoxHead):
    """ConvFCBBoxHead with float32 scores and boxes, also for the next stage of a cascade."""


@MODELS.register_module()
class InitializedCascadeRoIHead(CascadeRoIHead):
    """CascadeRoIHead whose `init_weights` also initialises the mask heads.

    MMDetection 3.x keeps them in a plain list, so that they keep PyTorch's default weights.
    """

    def init_mask_head(self, mask_roi_extractor: Any, mask_head: Any) -> None:
        super().init_mask_head(mask_roi_extractor, mask_head)
        self.mask_head: ModuleList = ModuleList(self.mask_head)
