"""Filters that an ELSA layer applies at single positions of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import ELSASwin
from .layers import ELSA
from .volo import ELSAVolo

Backbone = ELSASwin | ELSAVolo


@dataclass(frozen=True)
class Filters:
    """The filters of one ELSA layer at n positions of its map (arXiv 2112.12786, section 3).

    ``positions``: [n, 2] row and column in the map. ``stride``: pixels of the image per position.
    ``attention``: [n, G, K, K], each a distribution over the neighbourhood. ``ghost_add``,
    ``ghost_mul``: [C, K, K] or None, the same at all positions. ``effective``: [n, C, K, K], what
    the values are multiplied by. ``value``: [H, W, C], the map that it is applied to. ``output``:
    [n, C], what the layer's operator has given there. Channels are head-major.
    """

    positions: Tensor
    stride: int
    attention: Tensor
    ghost_add: Tensor | None
    ghost_mul: Tensor | None
    effective: Tensor
    value: Tensor
    output: Tensor

    def neighbourhoods(self) -> Tensor:
        """Return the values that each position sees, [n, C, K, K], with zeros outside the map."""
        size = self.effective.shape[-1]
        margin = size // 2
        padded = F.pad(self.value, (0, 0, margin, margin, margin, margin))
        seen = [padded[y : y + size, x : x + size] for y, x in self.positions.tolist()]
        return torch.stack(seen).permute(0, 3, 1, 2)


def neighbourhood_filters(
    backbone: Backbone, image: Tensor, stage: int, block: int, pixels: Sequence[tuple[int, int]]
) -> Filters:
    """Return the filters that a block applies at some pixels of an image.

    Args:
        backbone: `ELSASwin` or `ELSAVolo` in any mode; it is run in evaluation mode.
        image: [3, H, W] or [1, 3, H, W], normalised as for training.
        stage: index from 0, of a stage that attends with ELSA: all but the last of `ELSASwin`, the
            first of `ELSAVolo`.
        block: index from 0 in the stage.
        pixels: (x, y) of each pixel, from the upper left corner of ``image``.

    Raises:
        ValueError: the stage, block or pixel does not exist.
    """
    image = image.unsqueeze(0) if image.dim() == 3 else image
    stride, layer = _find_layer(backbone, stage, block)
    height, width = image.shape[-2:]
    for x, y in pixels:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"a pixel must be within the image, whose width and height are {width} and "
                f"{height}, got {x},{y}"
            )
    if not pixels:
        raise ValueError("one pixel at least is needed, got none")
    value, logits, output = _record(backbone, layer, image)
    positions = torch.tensor([(y // stride, x // stride) for x, y in pixels])
    rows, columns = positions.unbind(1)
    size = layer.kernel_size
    attention = logits[rows, columns].unflatten(1, (layer.num_heads, -1)).softmax(-1)
    attention = attention.unflatten(-1, (size, size))
    channels = value.shape[-1] // layer.num_heads
    effective = attention.repeat_interleave(channels, 1)
    ghost_add, ghost_mul = (
        None if filters is None else filters.detach() for filters in layer.ghost_filters()
    )
    if ghost_mul is not None:
        effective = effective * ghost_mul
    if ghost_add is not None:
        effective = effective + ghost_add
    return Filters(
        positions,
        stride,
        attention,
        ghost_add,
        ghost_mul,
        effective,
        value,
        output[rows, columns],
    )


def elsa_stages(backbone: Backbone) -> list[tuple[int, nn.Sequential | nn.ModuleList]]:
    """Return pixels per position, and the blocks, of each stage that attends with ELSA."""
    stride = backbone.patch_embed.patch_size
    if isinstance(backbone, ELSAVolo):
        return [(stride, backbone.network[0])]  # type: ignore[list-item]
    stages = list(backbone.layers)
    return [
        (stride * 2**index, stage.blocks)  # type: ignore[misc]
        for index, stage in enumerate(stages[: len(backbone.arch.depths) - 1])
    ]


def _find_layer(backbone: Backbone, stage: int, block: int) -> tuple[int, ELSA]:
    """Return pixels per position, and the layer."""
    stages = elsa_stages(backbone)
    if stage not in range(len(stages)):
        allowed = f"one of 0..{len(stages) - 1}, which attend" if stages[1:] else "0, which attends"
        raise ValueError(f"the stage must be {allowed} with ELSA, got {stage}")
    stride, blocks = stages[stage]
    if block not in range(len(blocks)):
        raise ValueError(
            f"the block of stage {stage} must be one of 0..{len(blocks) - 1}, got {block}"
        )
    layer: ELSA = blocks[block].attn  # type: ignore[assignment]
    return stride, layer


@torch.no_grad()
def _record(backbone: Backbone, layer: ELSA, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return value [H, W, C], logits [H, W, G*K*K] and output [H, W, C] of the layer's operator."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        seen[name] = tensor[0]

    handles = [
        layer.pre_proj.register_forward_hook(
            lambda _, inputs, out: keep("value", out.split(layer.split_sizes, dim=-1)[2])
        ),
        layer.attn[2].register_forward_hook(lambda _, inputs, out: keep("logits", out)),
        layer.post_proj.register_forward_pre_hook(lambda _, inputs: keep("output", inputs[0])),
    ]
    training = backbone.training
    try:
        backbone.eval()(image)
    finally:
        backbone.train(training)
        for handle in handles:
            handle.remove()
    return seen["value"], seen["logits"], seen["output"]
