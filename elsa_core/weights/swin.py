"""Use ImageNet weights of stock Swin as a warm start for the layers that ELSA-Swin shares with it.

These are the patch embedding, norms and MLPs of all blocks, the patch merging and the window
attention of the last stage (arXiv 2103.14030 and its code). Checkpoints may have the names of the
Swin release, of timm or of OpenMMLab.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from math import isqrt

import torch
from torch import Tensor

from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.variants import VARIANTS, Arch

from .source import BACKBONE, CLASSIFIER, SWIN, Source
from .tables import count_indices, shape_of

_MM_NAMES = (
    (r"patch_embed\.projection\.", "patch_embed.proj."),
    (r"stages\.(\d{1,3})\.", r"layers.\1."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
_SHARED = re.compile(
    r"patch_embed\.(proj|norm)\.\w+"
    r"|layers\.\d{1,3}\.blocks\.\d{1,3}\.(norm[12]|mlp\.fc[12])\.\w+"
    r"|layers\.\d{1,3}\.downsample\.(norm|reduction)\.\w+"
)
# The 2x2 neighbours in four slices, (0,0) (1,0) (0,1) (1,1), by their index in nn.Unfold's order.
_SLICES = [0, 2, 1, 3]


def recognise_swin(tensors: dict[str, Tensor]) -> Source:
    """Return a `Source` whose tensors have ELSA-Swin's names and layouts.

    Raises:
        UsageError: the tensors are not those of a whole Swin (version 1) ImageNet classifier.
    """
    tops = {name.split(".")[0] for name in tensors}
    if tops & {"neck", "roi_head", "roi_heads", "decode_head", "sem_seg_head", "bbox_head"}:
        raise UsageError(
            "it holds a detector or segmentor with a stock Swin: of Swin, only ImageNet "
            "checkpoints can be used"
        )
    if any("logit_scale" in name or "cpb_mlp" in name for name in tensors):
        raise UsageError("it holds a Swin V2, which shares too little with ELSA-Swin")
    mm = any(".attn.w_msa." in name for name in tensors)
    named = {_our_name(name, mm): (name, tensor) for name, tensor in tensors.items()}
    named = _downsample_after_blocks(named)
    arch = _arch({name: tensor for name, (_, tensor) in named.items()})
    last = len(arch.depths) - 1
    taken: dict[str, tuple[str, Tensor]] = {}
    dropped: list[tuple[str, str]] = []
    for name, (old, tensor) in named.items():
        if _SHARED.fullmatch(name):
            if mm and ".downsample." in name:
                tensor = _four_slices(tensor)
            taken[name] = (old, tensor)
        elif name.startswith(f"layers.{last}.blocks.") and ".attn." in name:
            _take_attention(name, old, tensor, taken, dropped)
        else:
            dropped.append((old, _reason(name)))
    return Source(SWIN, CLASSIFIER, arch, taken, dropped)


def is_warm_start(names: Collection[str]) -> bool:
    """Whether these are what `convert` makes of a Swin: an ELSA-Swin without ELSA's layers."""
    attention = {name.split(".attn.")[1].split(".")[0] for name in names if ".attn." in name}
    return attention == {"pre_proj", "post_proj", "rb"}


def recognise_warm_start(tensors: dict[str, Tensor]) -> Source:
    """Return a `Source` of what `convert` has made of a Swin, as of the Swin itself.

    The heads of all stages but the last are not in its tensors: those of a variant of the same
    sizes, or 1, which no result depends on.
    """
    named = {name.removeprefix("backbone."): (name, t) for name, t in tensors.items()}
    given = {name: tensor for name, (_, tensor) in named.items()}
    dim = shape_of(given, "patch_embed.proj.weight", 4)[0]
    stages = count_indices(given, "layers.")
    depths = tuple(count_indices(given, f"layers.{stage}.blocks.") for stage in range(stages))
    heads, span = shape_of(given, f"layers.{stages - 1}.blocks.0.attn.rb", 2)
    sizes = (dim, depths, heads)
    same = [v for v in VARIANTS.values() if (v.embed_dim, v.depths, v.num_heads[-1]) == sizes]
    known = same[0] if same else None
    try:
        arch = Arch(
            dim,
            depths,
            known.num_heads if known else (*[1] * (stages - 1), heads),
            group_width=known.group_width if known else 8,
            window_size=(isqrt(span) + 1) // 2,
        )
    except ValueError as error:
        raise UsageError(f"it looks like a warm start from Swin, but {one_line(error)}") from error
    return Source(SWIN, BACKBONE, arch, named)


def _our_name(name: str, mm: bool) -> str:
    name = name.removeprefix("backbone.")
    for pattern, new in _MM_NAMES if mm else ():
        name = re.sub(pattern, new, name)
    return name


def _downsample_after_blocks(
    named: dict[str, tuple[str, Tensor]],
) -> dict[str, tuple[str, Tensor]]:
    """Move the merging from the start of stages 1..3, as in newer timm, to the end of 0..2."""
    if any(name.startswith("layers.0.downsample.") for name in named):
        return named
    return {
        re.sub(
            r"^layers\.(\d{1,3})\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
        ): value
        for name, value in named.items()
    }


def _arch(tensors: dict[str, Tensor]) -> Arch:
    """Return the architecture of an ELSA-Swin with these sizes; Swin does not tell group_width."""
    pattern = re.compile(r"layers\.(\d{1,3})\.blocks\.(\d{1,3})\.")
    blocks = {(int(m[1]), int(m[2])) for name in tensors if (m := pattern.match(name))}
    depths = sorted(Counter(stage for stage, _ in blocks).items())
    try:
        tables = [
            tensors[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"]
            for stage, _ in depths
        ]
        embed_dim = tensors["patch_embed.proj.weight"].shape[0]
        heads = tuple(table.shape[1] for table in tables)
        sizes = (embed_dim, tuple(depth for _, depth in depths), heads)
        known = {(v.embed_dim, v.depths, v.num_heads): v.group_width for v in VARIANTS.values()}
        window = (round(tables[-1].shape[0] ** 0.5) + 1) // 2
        return Arch(*sizes, group_width=known.get(sizes, 8), window_size=window)
    except (IndexError, KeyError, ValueError) as error:
        raise UsageError(f"it looks like a Swin, but {error} is missing or malformed") from error


def _take_attention(
    name: str,
    old: str,
    tensor: Tensor,
    taken: dict[str, tuple[str, Tensor]],
    dropped: list[tuple[str, str]],
) -> None:
    """Take the last stage's window attention; [query, key, value] becomes [value, query, key]."""
    stem, _, part = name.partition(".attn.")
    kind, _, leaf = part.partition(".")
    if kind == "qkv":
        if not tensor.dim() or len(tensor) % 3:
            shape = list(tensor.shape)
            raise UsageError(f"{old} must have three parts of one size, got the shape {shape}")
        query, key, value = tensor.chunk(3)
        taken[f"{stem}.attn.pre_proj.{leaf}"] = (old, torch.cat([value, query, key]))
    elif kind == "proj":
        taken[f"{stem}.attn.post_proj.{leaf}"] = (old, tensor)
    elif kind == "relative_position_bias_table":
        taken[f"{stem}.attn.rb"] = (old, tensor.t().flip(1).contiguous())
    else:
        dropped.append((old, _reason(name)))


def _four_slices(tensor: Tensor) -> Tensor:
    """Reorder channels from nn.Unfold's, [..., C * 4], to those of four slices, [..., 4 * C]."""
    unfolded = tensor.unflatten(-1, (-1, 4))
    return unfolded.transpose(-1, -2)[..., _SLICES, :].flatten(-2).contiguous()


def _reason(name: str) -> str:
    if name.endswith(("relative_position_index", "attn_mask")):
        return "bookkeeping of Swin, follows from the window size"
    if ".attn." in name:
        return "ELSA replaces the window attention of this stage"
    if re.match(r"(norm\d*|head|fc)\.", name):
        return "part of the classifier, not of the backbone"
    raise UsageError(f"it looks like a Swin, but {name} is no part of one")
