"""Derive the tensors of a model, with their shapes, from a few of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.variants import Arch, VoloArch

from .names import CASCADE, UPERNET
from .tables import Shapes, ShapeTable, count_indices, read_elsa, read_heads, shape_of
from .volo import Volo, add_volo, read_volo

# An ELSA-Swin or an ELSA-VOLO, as its tensors show it.
Backbone = Arch | Volo
_AUX_STAGE = 2


@dataclass
class HeadSizes:
    """Sizes of the heads, from their tensors; None or empty for a part that does not exist."""

    num_classes: int | None = None
    channels: int | None = None
    neck_norm: str = ""
    anchors: int | None = None
    fc_dim: int | None = None
    box_convs: int = 0
    box_conv_dim: int | None = None
    box_fcs: int = 0
    mask_convs: int = 0
    mask_dim: int | None = None
    stages: int = 1
    pool_modules: int = 0
    aux_channels: int | None = None
    aux_stage: int | None = None


def read_backbone(tensors: Mapping[str, Tensor], prefix: str = "") -> Backbone:
    """Return the architecture of the backbone whose names begin with ``prefix``.

    The tensors do not hold the exponent and factor of the ghost filters. A single set of filters is
    taken as additive with factor 1, as in all published models.

    Raises:
        UsageError: tensors contradict each other.
    """
    if any(name.startswith(f"{prefix}network.") for name in tensors):
        return read_volo(tensors, prefix)
    embed_dim = shape_of(tensors, f"{prefix}patch_embed.proj.weight", 4)[0]
    stages = count_indices(tensors, f"{prefix}layers.")
    depths = [count_indices(tensors, f"{prefix}layers.{stage}.blocks.") for stage in range(stages)]
    if stages < 2 or 0 in depths:
        raise UsageError(f"its backbone has {stages} stages with {depths} blocks")
    elsa = read_elsa(tensors, f"{prefix}layers.0.blocks.0.attn")
    heads = [
        read_heads(tensors, f"{prefix}layers.{stage}.blocks.0.attn", elsa["kernel_size"])
        for stage in range(stages - 1)
    ]
    last = f"{prefix}layers.{stages - 1}.blocks.0.attn."
    if f"{last}attn.0.weight" in tensors:
        raise UsageError(
            f"its backbone ends with stage {stages - 1} of ELSA: it was built without the stages "
            "after it, whose outputs its model does not use, and fits no other model"
        )
    last_heads, span = shape_of(tensors, f"{last}rb", 2)
    try:
        return Arch(
            embed_dim=embed_dim,
            depths=tuple(depths),
            num_heads=(*heads, last_heads),
            window_size=(isqrt(span) + 1) // 2,
            **elsa,
        )
    except ValueError as error:
        raise UsageError(f"its backbone is no ELSA-Swin: {one_line(error)}") from error


def arch_of(backbone: Backbone) -> Arch | VoloArch:
    return backbone.arch if isinstance(backbone, Volo) else backbone


def arch_name(arch: Arch | VoloArch) -> str:
    """Return the variant's name, "tiny" or "volo_d1" for example, or "custom"."""
    return next((name for name, known in arch.variants.items() if known == arch), "custom")


def describe(backbone: Backbone) -> dict[str, Any]:
    """Return what is known of a backbone in JSON types, with None for what no tensor tells."""
    arch = arch_of(backbone)
    about = {**asdict(arch), "name": arch_name(arch)}
    about = {key: list(v) if isinstance(v, tuple) else v for key, v in about.items()}
    if isinstance(backbone, Volo):
        about |= {"img_size": backbone.img_size, "pyramid": backbone.pyramid}
        for index in backbone.unknown_heads:
            about["num_heads"][index] = None
    return about


def output_dims(backbone: Backbone) -> list[int]:
    """Return the channels of the maps that a whole model takes from the backbone."""
    return backbone.output_dims if isinstance(backbone, Volo) else backbone.num_features


def backbone_shapes(backbone: Backbone, prefix: str = "", in_chans: int = 3) -> Shapes:
    """Return the shapes of a backbone with all output norms, without the original's buffers.

    They are written out, because a model on the meta device makes PyTorch import 150 MB of modules.
    """
    table = ShapeTable()
    if isinstance(backbone, Volo):
        add_volo(table, backbone, prefix, in_chans)
        return table.shapes
    arch = backbone
    last = len(arch.depths) - 1
    table.layer(f"{prefix}patch_embed.proj", arch.embed_dim, in_chans, 4, 4)
    table.layer(f"{prefix}patch_embed.norm", arch.embed_dim)
    for stage, dim in enumerate(arch.num_features):
        for block in range(arch.depths[stage]):
            name = f"{prefix}layers.{stage}.blocks.{block}"
            table.layer(f"{name}.norm1", dim)
            if stage == last:
                _add_window_attention(table, f"{name}.attn", arch, dim, arch.num_heads[stage])
            else:
                table.elsa(f"{name}.attn", arch, dim, arch.num_heads[stage])
            table.layer(f"{name}.norm2", dim)
            table.mlp(f"{name}.mlp", dim, 4)
        if stage < last:
            name = f"{prefix}layers.{stage}.downsample"
            table.layer(f"{name}.norm", 4 * dim)
            table.layer(f"{name}.reduction", 2 * dim, 4 * dim, bias=False)
        table.layer(f"{prefix}norm{stage}", dim)
    return table.shapes


def _add_window_attention(table: ShapeTable, name: str, arch: Arch, dim: int, heads: int) -> None:
    table.shapes[f"{name}.rb"] = (heads, (2 * arch.window_size - 1) ** 2)
    table.layer(f"{name}.pre_proj", 3 * dim, dim)
    table.layer(f"{name}.post_proj", dim, dim)


def read_sizes(tensors: Mapping[str, Tensor], kind: str) -> HeadSizes:
    """Read the sizes of the heads. Raise UsageError if a tensor is missing or malformed."""
    return _segmentor_sizes(tensors) if kind == UPERNET else _detector_sizes(tensors, kind)


def model_shapes(backbone: Backbone, sizes: HeadSizes, kind: str, in_chans: int = 3) -> Shapes:
    """Return the shapes of a whole model of ``kind``, with OpenMMLab's names."""
    table = ShapeTable(backbone_shapes(backbone, "backbone.", in_chans))
    dims = output_dims(backbone)
    if kind == UPERNET:
        _add_segmentor(table, dims, sizes)
    else:
        _add_detector(table, dims, sizes, kind)
    return table.shapes


def has_masks(names: Iterable[str]) -> bool:
    """Whether a detector's tensors, with OpenMMLab's names, have a mask head among them."""
    return any(name.startswith("roi_head.mask_head.") for name in names)


def _detector_sizes(tensors: Mapping[str, Tensor], kind: str) -> HeadSizes:
    cascade = ".0" if kind == CASCADE else ""
    box, mask = f"roi_head.bbox_head{cascade}.", f"roi_head.mask_head{cascade}."
    convs = count_indices(tensors, f"{box}shared_convs.")
    masked = has_masks(tensors)
    return HeadSizes(
        num_classes=shape_of(tensors, f"{box}fc_cls.weight", 2)[0] - 1,
        channels=shape_of(tensors, "neck.lateral_convs.0.conv.weight", 4)[0],
        neck_norm=next(
            (n for n in ("bn", "gn") if f"neck.lateral_convs.0.{n}.weight" in tensors), ""
        ),
        anchors=shape_of(tensors, "rpn_head.rpn_cls.weight", 4)[0],
        fc_dim=shape_of(tensors, f"{box}shared_fcs.0.weight", 2)[0],
        box_convs=convs,
        box_conv_dim=shape_of(tensors, f"{box}shared_convs.0.conv.weight", 4)[0] if convs else None,
        box_fcs=count_indices(tensors, f"{box}shared_fcs."),
        mask_convs=count_indices(tensors, f"{mask}convs."),
        mask_dim=shape_of(tensors, f"{mask}upsample.weight", 4)[0] if masked else None,
        stages=count_indices(tensors, "roi_head.bbox_head.") if cascade else 1,
    )


def _add_detector(table: ShapeTable, dims: list[int], sizes: HeadSizes, kind: str) -> None:
    channels, anchors = sizes.channels or 0, sizes.anchors or 0
    for level, dim in enumerate(dims):
        table.block(f"neck.lateral_convs.{level}", channels, dim, 1, 1, norm=sizes.neck_norm)
        table.block(f"neck.fpn_convs.{level}", channels, channels, 3, 3, norm=sizes.neck_norm)
    table.layer("rpn_head.rpn_conv", channels, channels, 3, 3)
    table.layer("rpn_head.rpn_cls", anchors, channels, 1, 1)
    table.layer("rpn_head.rpn_reg", 4 * anchors, channels, 1, 1)
    for stage in range(sizes.stages):
        part = f".{stage}" if kind == CASCADE else ""
        _add_box_head(table, f"roi_head.bbox_head{part}", sizes)
        if sizes.mask_dim is not None:
            _add_mask_head(table, f"roi_head.mask_head{part}", sizes)


def _add_box_head(table: ShapeTable, name: str, sizes: HeadSizes) -> None:
    dim, fc_dim, classes = sizes.channels or 0, sizes.fc_dim or 0, sizes.num_classes or 0
    for index in range(sizes.box_convs):
        out = sizes.box_conv_dim or 0
        table.block(f"{name}.shared_convs.{index}", out, dim, 3, 3, norm="bn")
        dim = out
    dim *= 7 * 7
    for index in range(sizes.box_fcs):
        table.layer(f"{name}.shared_fcs.{index}", fc_dim, dim)
        dim = fc_dim
    table.layer(f"{name}.fc_cls", classes + 1, dim)
    table.layer(f"{name}.fc_reg", 4 * classes, dim)


def _add_mask_head(table: ShapeTable, name: str, sizes: HeadSizes) -> None:
    dim, mask_dim = sizes.channels or 0, sizes.mask_dim or 0
    for index in range(sizes.mask_convs):
        table.block(f"{name}.convs.{index}", mask_dim, dim, 3, 3, norm="")
        dim = mask_dim
    table.shapes[f"{name}.upsample.weight"] = (dim, mask_dim, 2, 2)
    table.shapes[f"{name}.upsample.bias"] = (mask_dim,)
    table.layer(f"{name}.conv_logits", sizes.num_classes or 0, mask_dim, 1, 1)


def _segmentor_sizes(tensors: Mapping[str, Tensor]) -> HeadSizes:
    dims = output_dims(read_backbone(tensors, "backbone."))
    aux = stage = None
    if any(name.startswith("auxiliary_head.") for name in tensors):
        aux, aux_in, _, _ = shape_of(tensors, "auxiliary_head.convs.0.conv.weight", 4)
        if aux_in not in dims:
            raise UsageError(
                "the auxiliary head must take one of the backbone's maps, which have "
                f"{dims} channels, got {aux_in}"
            )
        # Of several maps with these channels, the published one.
        stage = _AUX_STAGE if aux_in in dims[_AUX_STAGE:][:1] else dims.index(aux_in)
    return HeadSizes(
        num_classes=shape_of(tensors, "decode_head.conv_seg.weight", 4)[0],
        channels=shape_of(tensors, "decode_head.bottleneck.conv.weight", 4)[0],
        pool_modules=count_indices(tensors, "decode_head.psp_modules."),
        aux_channels=aux,
        aux_stage=stage,
    )


def _add_segmentor(table: ShapeTable, dims: list[int], sizes: HeadSizes) -> None:
    channels, classes = sizes.channels or 0, sizes.num_classes or 0
    *finer, top = dims
    head = "decode_head"
    table.layer(f"{head}.conv_seg", classes, channels, 1, 1)
    for index in range(sizes.pool_modules):
        table.block(f"{head}.psp_modules.{index}.1", channels, top, 1, 1, norm="bn")
    pooled = top + sizes.pool_modules * channels
    table.block(f"{head}.bottleneck", channels, pooled, 3, 3, norm="bn")
    for index, dim in enumerate(finer):
        table.block(f"{head}.lateral_convs.{index}", channels, dim, 1, 1, norm="bn")
        table.block(f"{head}.fpn_convs.{index}", channels, channels, 3, 3, norm="bn")
    stacked = len(dims) * channels
    table.block(f"{head}.fpn_bottleneck", channels, stacked, 3, 3, norm="bn")
    if sizes.aux_channels is not None:
        aux_in = dims[sizes.aux_stage or 0]
        table.block("auxiliary_head.convs.0", sizes.aux_channels, aux_in, 3, 3, norm="bn")
        table.layer("auxiliary_head.conv_seg", classes, sizes.aux_channels, 1, 1)
