"""What can be exported: a bare backbone, UPerNet and the detectors, in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elsa_core import ELSASwin, ELSAVolo
from elsa_core.layers import pad_to_multiple
from elsa_core.runtime.errors import UsageError
from elsa_tools.predict.inferencer import Inferencer

# Height and width of the image that exports trace: odd, so that nothing is taken for a constant.
EXAMPLE = (97, 131)


def family_of(backbone: ELSASwin | ELSAVolo) -> Any:
    """The class of `elsa_core` whose `forward` returns the maps as a tuple."""
    return ELSAVolo if isinstance(backbone, ELSAVolo) else ELSASwin


def map_strides(backbone: ELSASwin | ELSAVolo) -> tuple[int, list[int]]:
    """What the sides of images are padded to multiples of, and the stride of each map.

    The sides of a map of a larger stride are rounded up.
    """
    if isinstance(backbone, ELSAVolo):
        return 16, backbone.strides
    return backbone.patch_embed.patch_size, [
        backbone.patch_embed.patch_size * 2**stage for stage in range(len(backbone.num_features))
    ]


class Exportable(nn.Module):
    """A model whose inputs and outputs are tensors with names, for images of any number and size.

    Attributes:
        task: "detection", "segmentation" or "features".
        inputs, names: of the inputs and outputs of `forward`.
        backbone: whose forward pass exporters may replace by a graph of their own.
        normalised: whether the image must be normalised already; else it is RGB, 0..255.
    """

    task: str
    inputs: tuple[str, ...] = ("image",)
    names: tuple[str, ...]
    backbone: ELSASwin | ELSAVolo
    normalised: bool

    def example(self) -> tuple[Tensor, ...]:
        """Two images of odd sides, and what else `forward` takes."""
        return (torch.zeros(2, self.backbone.in_chans, *EXAMPLE),)

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """The dimensions of each input that vary, as `torch.export` takes them."""
        dynamic = torch.export.Dim.DYNAMIC
        return ({0: dynamic, 2: dynamic, 3: dynamic},)


class Backbone(Exportable):
    """Images [B, 3, H, W] -> a map [B, C_i, H_i, W_i] of each output of the backbone.

    Args:
        normalisation: mean and deviation of images with values in 0..255, RGB; None for images
            that are normalised already.
    """

    task = "features"
    divisor = 1  # normalised images are padded with zeros to multiples of it
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: ELSASwin | ELSAVolo,
        normalisation: tuple[Sequence[float], Sequence[float]] | None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.normalised = normalisation is None
        mean, std = normalisation or ([0.0] * 3, [1.0] * 3)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        # A level of a pyramid is called after its stride, 2 ** i.
        native = isinstance(backbone, ELSAVolo) and not backbone.pyramid
        self.names = tuple(
            f"stage{index + 1}" if native else f"res{index + 2}" for index in backbone.out_indices
        )

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        image = image if self.normalised else (image - self.mean) / self.std
        if self.divisor > 1:
            image = pad_to_multiple(image, self.divisor, first=2)
        return family_of(self.backbone).forward(self.backbone, image)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.features(image)


class Segmentor(Backbone):
    """Images [B, 3, H, W] -> logits [B, K, H, W], for Detectron2's and MMSegmentation's UPerNet."""

    task = "segmentation"

    def __init__(
        self,
        inferencer: Inferencer,
        normalisation: tuple[Sequence[float], Sequence[float]] | None,
    ) -> None:
        model: Any = inferencer.model
        super().__init__(model.backbone, normalisation)
        self.names = ("logits",)
        self.detectron2 = inferencer.framework == "detectron2"
        self.head: Any = model.sem_seg_head if self.detectron2 else model.decode_head
        if self.detectron2:
            self.divisor = max(model.backbone.size_divisibility, 1)
        else:
            self.divisor = (model.data_preprocessor.test_cfg or {}).get("size_divisor", 1)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.features(image)
        if self.detectron2:
            backbone: Any = self.backbone
            logits = self.head.logits(dict(zip(backbone._out_features, features, strict=True)))
        else:
            logits = self.head(features)
        height, width = image.shape[-2:]
        padded = [
            (side + self.divisor - 1) // self.divisor * self.divisor for side in (height, width)
        ]
        logits = F.interpolate(logits, padded, mode="bilinear", align_corners=False)
        return (logits[..., :height, :width] if self.divisor > 1 else logits,)


def round_weights(module: nn.Module) -> None:
    """Rounds the weights, all parameters of two or more dimensions, to float16.

    Files that store them in float16 then compute with exactly the same numbers.

    Raises UsageError for a weight that float16 cannot hold.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                rounded = parameter.half().float()
                if not rounded.isfinite().all():
                    largest = parameter.abs().max().item()
                    raise UsageError(
                        f"float16 holds weights up to 65504, {name} has one of {largest:g}"
                    )
                parameter.copy_(rounded)
