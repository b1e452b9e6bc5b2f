"""Derive the tensors of an ELSA-VOLO, with their shapes, from a few of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.variants import VOLO_VARIANTS, VoloArch

from .tables import ShapeTable, count_indices, read_elsa, read_heads, shape_of

_STAGES = (0, 2, 3, 4)  # entries of `network`; 1 halves the map
_CLASS_BLOCKS = 2
_OUTLOOK_ENTRIES = 3**4  # logits of outlook attention per head
HEADS = ("head", "aux_head")
CLASS_PARTS = ("cls_token", "post_network", "norm", *HEADS)
OUTPUTS = re.compile(r"(norm\d+|upsample)\.")
_FIRST = "network.0.0.attn"
LOCAL = re.compile(r"network\.0\.\d{1,3}\.attn\.")


@dataclass(frozen=True)
class Volo:
    """An ELSA-VOLO, or a VOLO, as its tensors show it.

    ``grid``: positions along each side of ``pos_embed``. ``pyramid``: whether the output norms are
    those of a pyramid; None if there are none that tell. ``unknown_heads``: indices in
    ``arch.num_heads`` of numbers that neither the tensors nor a variant of the same sizes tell, and
    that are 1 there.
    """

    arch: VoloArch
    grid: int
    pyramid: bool | None = None
    unknown_heads: tuple[int, ...] = ()

    @property
    def output_dims(self) -> list[int]:
        dims = self.arch.num_features
        return [dims[0] // 2, *dims[:2], dims[3]] if self.pyramid else dims

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `elsa_core.ELSAVolo` for this backbone."""
        return {"arch": self.arch, "img_size": self.img_size, "pyramid": bool(self.pyramid)}

    @property
    def img_size(self) -> int:
        return 16 * self.grid


def read_volo(tensors: Mapping[str, Tensor], prefix: str = "") -> Volo:
    """Return the backbone whose names begin with ``prefix``; of a VOLO, that of its warm start.

    Raises:
        UsageError: tensors contradict each other.
    """
    if prefix:
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    depths = tuple(count_indices(tensors, f"network.{stage}.") for stage in _STAGES)
    if 0 in depths:
        raise UsageError(
            f"its backbone has {', '.join(map(str, depths))} blocks in VOLO's four stages: it was "
            "built without stages whose outputs its model does not use, and fits no other model"
        )
    stem_dim = shape_of(tensors, "patch_embed.conv.0.weight", 4)[0]
    dim = shape_of(tensors, "patch_embed.proj.weight", 4)[0]
    _, rows, columns, out_dim = shape_of(tensors, "pos_embed", 4)
    if rows != columns:
        raise UsageError(
            "pos_embed must have as many rows as columns, got the shape "
            f"{list(tensors['pos_embed'].shape)}"
        )
    hidden = shape_of(tensors, "network.0.0.mlp.fc1.weight", 2)[0]
    if hidden % dim:
        raise UsageError(
            f"the MLPs must have a multiple of {dim} hidden channels, got {hidden} in "
            "network.0.0.mlp.fc1.weight"
        )
    sizes = {
        "depths": depths,
        "embed_dims": (dim, out_dim),
        "mlp_ratio": hidden // dim,
        "stem_dim": stem_dim,
    }
    heads, elsa = _read_local(tensors)
    known = next((arch for arch in VOLO_VARIANTS.values() if _agrees(arch, heads, sizes)), None)
    if elsa is None and known:
        elsa = {n: getattr(known, n) for n in ("kernel_size", "group_width", "lam", "gamma")}
    bias = any(name.endswith(".attn.qkv.bias") for name in tensors)
    try:
        arch = VoloArch(
            **sizes,  # type: ignore[arg-type]
            num_heads=known.num_heads if known else (heads or 1, 1),
            qkv_bias=bias,
            **elsa or {},
        )
    except ValueError as error:
        raise UsageError(f"its backbone is no ELSA-VOLO: {one_line(error)}") from error
    unknown = () if known else (1,) if heads else (0, 1)
    return Volo(arch, rows, _is_pyramid(tensors, dim), unknown)


def _agrees(arch: VoloArch, heads: int | None, sizes: Mapping[str, Any]) -> bool:
    same = all(getattr(arch, name) == value for name, value in sizes.items())
    return same and heads in (None, arch.num_heads[0])


def _read_local(tensors: Mapping[str, Tensor]) -> tuple[int | None, dict[str, Any] | None]:
    """Return the heads of the first stage, and ELSA's settings; None if they are not there."""
    if f"{_FIRST}.attn.weight" in tensors:
        logits = shape_of(tensors, f"{_FIRST}.attn.weight", 2)[0]
        if logits % _OUTLOOK_ENTRIES:
            raise UsageError(
                f"{_FIRST}.attn.weight must have a multiple of {_OUTLOOK_ENTRIES} rows, those of "
                f"outlook attention over 3x3 positions, got {logits}"
            )
        return logits // _OUTLOOK_ENTRIES, None
    if is_warm_start(tensors):
        return None, None
    elsa = read_elsa(tensors, _FIRST)
    return read_heads(tensors, _FIRST, elsa["kernel_size"]), elsa


def is_warm_start(names: Collection[str]) -> bool:
    """Whether these are what `convert` makes of a VOLO: ELSA's projections without its logits."""
    local = [name for name in names if LOCAL.match(name)]
    return bool(local) and all(".pre_proj." in n or ".post_proj." in n for n in local)


def _is_pyramid(tensors: Mapping[str, Tensor], dim: int) -> bool | None:
    if "upsample.weight" in tensors:
        return True
    for index, channels in enumerate((dim // 2, dim)):
        if f"norm{index}.weight" in tensors:
            return len(tensors[f"norm{index}.weight"]) == channels
    return None


def add_volo(table: ShapeTable, volo: Volo, prefix: str, in_chans: int = 3) -> None:
    """Add a backbone with all output norms; without those that differ if ``pyramid`` is None."""
    arch = volo.arch
    dim, out_dim = arch.embed_dims
    stem = arch.stem_dim
    for index, (channels, size) in enumerate(((in_chans, 7), (stem, 3), (stem, 3))):
        name = f"{prefix}patch_embed.conv."
        table.layer(f"{name}{3 * index}", stem, channels, size, size, bias=False)
        table.layer(f"{name}{3 * index + 1}", stem)
        table.statistics(f"{name}{3 * index + 1}", stem)
    table.layer(f"{prefix}patch_embed.proj", dim, stem, 4, 4)
    for stage, depth in zip(_STAGES, arch.depths, strict=True):
        channels = out_dim if stage else dim
        for block in range(depth):
            name = f"{prefix}network.{stage}.{block}"
            table.layer(f"{name}.norm1", channels)
            if stage:
                table.layer(f"{name}.attn.qkv", 3 * channels, channels, bias=arch.qkv_bias)
                table.layer(f"{name}.attn.proj", channels, channels)
            else:
                table.elsa(f"{name}.attn", arch, dim, arch.num_heads[0], arch.qkv_bias)
            table.layer(f"{name}.norm2", channels)
            table.mlp(f"{name}.mlp", channels, arch.mlp_ratio)
        if not stage:
            table.layer(f"{prefix}network.1.proj", out_dim, dim, 2, 2)
            table.shapes[f"{prefix}pos_embed"] = (1, volo.grid, volo.grid, out_dim)
    if volo.pyramid:
        table.shapes[f"{prefix}upsample.weight"] = (dim, dim // 2, 2, 2)
        table.shapes[f"{prefix}upsample.bias"] = (dim // 2,)
    for index, channels in enumerate(volo.output_dims):
        if volo.pyramid is not None or index > 1:
            table.layer(f"{prefix}norm{index}", channels)


def add_class_parts(table: ShapeTable, volo: Volo, given: Mapping[str, Tensor]) -> None:
    """Add what a classifier has after the backbone; of optional parts those that are ``given``."""
    arch, dim = volo.arch, volo.arch.embed_dims[1]
    if tops_of(given) & {"cls_token", "post_network"}:
        table.shapes["cls_token"] = (1, 1, dim)
        for block in range(_CLASS_BLOCKS):
            name = f"post_network.{block}"
            table.layer(f"{name}.norm1", dim)
            table.layer(f"{name}.attn.kv", 2 * dim, dim, bias=arch.qkv_bias)
            table.layer(f"{name}.attn.q", dim, dim, bias=arch.qkv_bias)
            table.layer(f"{name}.attn.proj", dim, dim)
            table.layer(f"{name}.norm2", dim)
            table.mlp(f"{name}.mlp", dim, arch.mlp_ratio)
    table.layer("norm", dim)
    for head in HEADS if "aux_head" in tops_of(given) else HEADS[:1]:
        weight = given.get(f"{head}.weight")
        table.layer(head, len(weight) if weight is not None and weight.dim() else 1, dim)


def tops_of(names: Collection[str]) -> set[str]:
    return {name.split(".")[0] for name in names}
