"""Parts of MMDetection's detectors with the numerics and first weights of MMDetection 2.11.

The published models were trained with that release. Configs name these classes by their full path,
because `elsa_mm` needs no MMDetection.
"""

from __future__ import annotations

from typing import Any

import torch
from mmcv.ops import RoIAlign
from mmdet.models import (
    CascadeRoIHead,
    ConvFCBBoxHead,
    DetDataPreprocessor,
    FCNMaskHead,
    RPNHead,
    SingleRoIExtractor,
)
from mmengine.model import ModuleList
from mmengine.registry import MODELS
from mmengine.utils import apply_to
from torch import Tensor, nn

from elsa_core.heads import mask_logits, pools_fast, upsamples_fast
from elsa_core.linear import fast_linear

from .channels import AnyChannels


@MODELS.register_module()
class Float32RoIExtractor(SingleRoIExtractor):
    """SingleRoIExtractor that computes in float32, also in mixed precision.

    MMDetection 3.x rounds the RoIs to the dtype of the maps. In float16 this moves them by up to
    half a pixel, and areas of more than 65504 square pixels become infinite: such RoIs are pooled
    from the coarsest level, whatever their size. At inference on the CPU, `elsa::roi_align` pools
    the maps.
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
        layer = self.roi_layers[0]
        if (
            isinstance(layer, RoIAlign)
            and layer.aligned
            and layer.pool_mode == "avg"
            and len(set(layer.output_size)) == 1
            and roi_scale_factor is None
            and pools_fast(maps[0], rois)
        ):
            levels = self.map_roi_levels(rois, len(maps))
            scales = [layer.spatial_scale for layer in self.roi_layers]
            images, options = rois[:, 0].long(), (layer.output_size[0], layer.sampling_ratio)
            pooled = torch.ops.elsa.roi_align(maps, rois[:, 1:], images, levels, scales, *options)
            return pooled.to(feats[0].dtype)
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
    """ConvFCBBoxHead with float32 scores and boxes, also for the next stage of a cascade.

    Its linear layers are those of `elsa_core`.
    """

    def _add_conv_fc_branch(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, int]:
        convs, layers, width = super()._add_conv_fc_branch(*args, **kwargs)
        return convs, nn.ModuleList(map(fast_linear, layers)), width


@MODELS.register_module()
class FastMaskHead(FCNMaskHead):
    """FCNMaskHead that computes in channels-last layout at inference on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes, 2h, 2w) of the features (n, C, h, w) of RoIs."""
        if not upsamples_fast(x, self.upsample, self.conv_logits):
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        for convolution in self.convs:
            x = convolution(x)
        return mask_logits(x, self.upsample, self.conv_logits)


@MODELS.register_module()
class InitializedCascadeRoIHead(CascadeRoIHead):
    """CascadeRoIHead whose `init_weights` also initialises the mask heads.

    MMDetection 3.x keeps them in a plain list, so that they keep PyTorch's default weights.
    """

    def init_mask_head(self, mask_roi_extractor: Any, mask_head: Any) -> None:
        super().init_mask_head(mask_roi_extractor, mask_head)
        self.mask_head: ModuleList = ModuleList(self.mask_head)


@MODELS.register_module()
class AnyChannelsDetPreprocessor(AnyChannels, DetDataPreprocessor):
    """MMDetection's DetDataPreprocessor with `elsa_mm.channels.AnyChannels`."""
