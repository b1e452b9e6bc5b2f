"""Computes what ELSA attends to in a photograph, from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elsa_core.data.images import read_image
from elsa_core.filters import elsa_stages, neighbourhood_filters
from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.variants import Arch, VoloArch
from elsa_core.weights.convert import convert
from elsa_core.weights.files import naming, read_source
from elsa_core.weights.recognise import PIXELS
from elsa_core.weights.volo import OUTPUTS, Volo

from ..archs import Backbone, build_backbone, describe_arch


@dataclass
class View:
    """What a block attends to in a photograph, as `picture.draw` takes it.

    ``photo``: input of the network, [H, W, 3] of uint8. ``pixels``: (x, y) in it.
    ``attention`` and ``effective``: [n, K, K] means of a head or of all; ``ghosts``: {"added" or
    "multiplied": [K, K]}. ``of``: which head or channel, in words; ``title``: model, stage, block.
    """

    photo: np.ndarray
    pixels: list[tuple[int, int]]
    stride: int
    attention: np.ndarray
    ghosts: dict[str, np.ndarray]
    effective: np.ndarray
    of: str
    title: str


def untrained_backbone(arch: Arch | VoloArch) -> tuple[Backbone, str]:
    """Returns a backbone with random weights, the same each time, and its name in pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone(arch)
    return backbone.eval(), f"{describe_arch(arch)}, untrained random weights"


def trained_backbone(path: str) -> tuple[Backbone, str]:
    """Returns the backbone of any readable checkpoint, and its name in pictures.

    Raises UsageError for a file that cannot be read or has no trained ELSA attention.
    """
    source = read_source(path)
    with naming(path):
        conversion = convert(source, "backbone")
    if any(".attn." in name for name, _ in conversion.absent):
        raise UsageError(f"{path} holds {source}, which has no ELSA attention to look at")
    known = source.backbone
    options = known.options if isinstance(known, Volo) else {"arch": known}
    backbone = build_backbone(**options)
    tensors = {name: t for name, t in conversion.tensors.items() if not OUTPUTS.match(name)}
    backbone.load_state_dict(tensors, strict=False)
    return backbone.eval(), f"{describe_arch(source.arch)} of {os.path.basename(path)}"


def read_photo(path: str, longest: int) -> tuple[np.ndarray, float]:
    """Returns RGB [H, W, 3] of uint8, shrunk to sides of at most ``longest`` pixels, and the scale.

    Raises UsageError, which names the file, for a file that is not a complete image.
    """
    try:
        image = Image.fromarray(read_image(path))
    except UsageError as error:
        raise UsageError(f"the image {path} cannot be read: {error}") from error
    scale = min(1.0, longest / max(image.size))
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image), scale


def to_input(photo: np.ndarray) -> Tensor:
    """Normalises [H, W, 3] of uint8 to [1, 3, H, W]."""
    mean, std = (np.array(values, np.float32) for values in PIXELS.values())
    scaled = (photo.astype(np.float32) - mean) / std
    return torch.from_numpy(scaled).permute(2, 0, 1).unsqueeze(0)


def default_pixels(photo: np.ndarray) -> list[tuple[int, int]]:
    """Returns a grid of 3 columns and 2 rows."""
    height, width = photo.shape[:2]
    return [(width * x // 6, height * y // 4) for y in (1, 3) for x in (1, 3, 5)]


def look(
    backbone: Backbone,
    name: str,
    photo: np.ndarray,
    pixels: Sequence[tuple[int, int]],
    stage: int,
    block: int | None = None,
    head: int | None = None,
    channel: int | None = None,
) -> View:
    """Computes what a block attends to at ``pixels`` of ``photo``.

    Args:
        stage, block, head, channel: counted from 1.
        block: None for the last block of the stage.
        head: head whose filters are shown; None for the mean of all heads.
        channel: channel of the stage whose filters are shown, with the attention of its head; None
            for the mean of the channels.

    Raises UsageError if the model does not have the stage, block, head or channel.
    """
    depths, heads = backbone.arch.depths, backbone.arch.num_heads
    attending = len(elsa_stages(backbone))
    _check("--stage", stage, attending, ": the other stages have no ELSA")
    block = depths[stage - 1] if block is None else block
    _check("--block", block, depths[stage - 1])
    channels, count = backbone.arch.num_features[stage - 1], heads[stage - 1]
    if head is not None and channel is not None:
        raise UsageError("--head and --channel exclude each other: a channel has one head")
    if head is not None:
        _check("--head", head, count)
    if channel is not None:
        _check("--channel", channel, channels)
    try:
        filters = neighbourhood_filters(backbone, to_input(photo), stage - 1, block - 1, pixels)
    except ValueError as error:
        raise UsageError(f"--pixel: {one_line(error)}") from error
    share = channels // count
    if channel is not None:
        rows, chosen_heads = slice(channel - 1, channel), [(channel - 1) // share]
        of = f"channel {channel} of {channels}, in head {(channel - 1) // share + 1}"
    elif head is not None:
        rows, chosen_heads = slice((head - 1) * share, head * share), [head - 1]
        of = f"head {head} of {count}, mean of its channels"
    else:
        rows, chosen_heads = slice(None), list(range(count))
        of = f"mean of all {count} heads" if count > 1 else "mean of the channels of its one head"
    ghosts = {"multiplied": filters.ghost_mul, "added": filters.ghost_add}
    return View(
        photo,
        list(pixels),
        filters.stride,
        filters.attention[:, chosen_heads].mean(1).numpy(),
        {name: one[rows].mean(0).numpy() for name, one in ghosts.items() if one is not None},
        filters.effective[:, rows].mean(1).numpy(),
        of,
        f"{name}: stage {stage}, block {block}",
    )


def _check(option: str, value: int, last: int, note: str = "") -> None:
    if not 1 <= value <= last:
        allowed = f"one of 1..{last}" if last > 1 else "1"
        raise UsageError(f"{option} must be {allowed} in this model, got {value}{note}")
