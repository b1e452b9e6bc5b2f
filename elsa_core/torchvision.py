"""ELSA-Swin as a backbone of torchvision's detectors: `elsa_swin_fpn_backbone`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from .backbone import ELSASwin
from .variants import Arch


class ELSASwinFPN(nn.Module):
    """[B, 3, H, W] -> {"0": [B, out_channels, H/4, W/4], ..., "pool": ...}, the finest map first.

    ``body`` is an `elsa_core.ELSASwin` with its parameter names, so that
    ``elsa_core.weights.load_backbone(backbone.body, path)`` loads any checkpoint of it; ``fpn`` is
    torchvision's feature pyramid.
    """

    def __init__(
        self,
        body: ELSASwin,
        out_channels: int,
        extra_blocks: ExtraFPNBlock,
        norm_layer: Callable[..., nn.Module] | None,
    ) -> None:
        super().__init__()
        self.body = body
        channels = [body.num_features[stage] for stage in body.out_indices]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks, norm_layer)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(index): map for index, map in enumerate(self.body(x))})


def elsa_swin_fpn_backbone(
    arch: str | Mapping[str, Any] | Arch = "tiny",
    *,
    out_channels: int = 256,
    trainable_layers: int = 5,
    returned_layers: Sequence[int] = (1, 2, 3, 4),
    extra_blocks: ExtraFPNBlock | None = None,
    norm_layer: Callable[..., nn.Module] | None = None,
    **options: Any,
) -> ELSASwinFPN:
    """Build a backbone for torchvision's `FasterRCNN`, `MaskRCNN`, ...

    Args:
        arch, options: as in `elsa_core.ELSASwin`, such as ``drop_path_rate``.
        out_channels: channels of each map.
        trainable_layers: number of layers, from the last, that are not frozen: 5 all, 4 all but
            the patch embedding, 0 none. This and the following are as in torchvision's
            ``resnet_fpn_backbone``.
        returned_layers: stages, counted from 1, whose maps the pyramid uses.
        extra_blocks: default: one more map, half as large as the last (``LastLevelMaxPool``).
        norm_layer: norm of the pyramid.

    Raises:
        ValueError: an unknown ``arch``, or layers that it does not have.
    """
    stages = len(Arch.from_spec(arch).depths)
    if trainable_layers not in range(stages + 2):
        raise ValueError(
            f"trainable_layers must be 0..{stages + 1}, got trainable_layers={trainable_layers}"
        )
    known = range(1, stages + 1)
    if not returned_layers or list(returned_layers) != sorted(set(returned_layers) & set(known)):
        raise ValueError(
            f"returned_layers must be one or more of 1..{stages}, each once and in ascending "
            f"order, got returned_layers={returned_layers}"
        )
    body = ELSASwin(
        arch,
        out_indices=[layer - 1 for layer in returned_layers],
        frozen_stages=stages - trainable_layers,
        **options,
    )
    return ELSASwinFPN(body, out_channels, extra_blocks or LastLevelMaxPool(), norm_layer)
