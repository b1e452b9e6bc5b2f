"""Fit weights for RGB images to a model of images with other channels."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from torch import Tensor, nn

from elsa_core.backbone import StagedBackbone
from elsa_core.runtime.errors import UsageError

from .fit import backbones_of
from .source import RGB

logger = logging.getLogger(__name__)


def spread(weight: Tensor, in_chans: int) -> Tensor:
    """Return the weight [O, 3, H, W] of a first convolution for ``in_chans`` channels.

    As in timm: channel i gets the weights of channel i % 3, times 3 / ``in_chans``, so that equal
    channels give about the same output; a single channel gets the sum.
    """
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, -(-in_chans // RGB), 1, 1)[:, :in_chans]
    return (repeated * (RGB / in_chans)).to(weight.dtype)


def fit_channels(
    model: nn.Module, tensors: MutableMapping[str, Any], path: str, *, begins: bool = True
) -> str:
    """Spread a checkpoint's first convolution, in place, over the channels of a model's backbone.

    Args:
        begins: a training begins with these weights; otherwise, they must have the channels.

    Returns:
        A note for the report, which is also logged; "" if nothing changes.

    Raises:
        UsageError: the checkpoint has other channels than the model and may not be spread: only
            three channels are, and only where a training begins.
    """
    note = ""
    for prefix, part in backbones_of(model):
        first = first_convolution(part)
        for name in (f"{prefix}{first}", f"module.{prefix}{first}"):
            weight, wanted = tensors.get(name), part.get_parameter(first).shape
            if not isinstance(weight, Tensor) or weight.dim() != len(wanted):
                continue
            got, in_chans = weight.shape[1], wanted[1]
            if got == in_chans:
                continue
            if got != RGB or not begins:
                why = "can only begin a training" if got == RGB else "cannot be spread over others"
                raise UsageError(
                    f"the checkpoint {path} is for images of {got} channels, the model for images "
                    f"of {in_chans}: weights for {got} channels {why}"
                )
            tensors[name] = spread(weight, in_chans)
            how = "summed up" if in_chans == 1 else f"repeated, times {RGB}/{in_chans}"
            note = f"{name}: the weights of {RGB} channels, {how}, for {in_chans}"
            logger.warning(f"{path}: {note}")
    return note


def first_convolution(backbone: StagedBackbone) -> str:
    """Return the name of the weight that takes the image."""
    embedding = backbone.get_submodule("patch_embed").named_modules()
    return next(f"patch_embed.{n}.weight" for n, part in embedding if isinstance(part, nn.Conv2d))
