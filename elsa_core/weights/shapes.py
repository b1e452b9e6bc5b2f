"""Derive the tensors of a model, with their shapes, from a few of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt

from torch import Tensor

from elsa_core import VARIANTS
from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.variants import Arch

from .names import CASCADE, UPERNET

Shapes = dict[str, tuple[int, ...]]
OPTIONAL_LEAF = "num_batches_tracked"


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


@dataclass
class ShapeTable:
    shapes: Shapes = field(default_factory=dict)

    def layer(self, name: str, *shape: int, bias: bool = True) -> None:
        self.shapes[f"{name}.weight"] = shape
        if bias:
            self.shapes[f"{name}.bias"] = (shape[0],)

    def block(self, name: str, *shape: int, norm: str) -> None:
        """Add a ConvModule. Its convolution has a bias if no norm follows."""
        self.layer(f"{name}.conv", *shape, bias=not norm)
        if norm:
            self.layer(f"{name}.{norm}", shape[0])
        if norm == "bn":
            for statistic in ("running_mean", "running_var"):
                self.shapes[f"{name}.bn.{statistic}"] = (shape[0],)
            self.shapes[f"{name}.bn.{OPTIONAL_LEAF}"] = ()


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> list[int]:
    if name not in tensors:
        raise UsageError(f"the tensor {name} is missing")
    shape = list(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise UsageError(f"{name} must have {dimensions} dimensions, got the shape {shape}")
    return shape


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Count the indices that follow ``prefix``."""
    found = {key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)}
    return len({index for index in found if index.isdigit()})


def read_arch(tensors: Mapping[str, Tensor], prefix: str = "") -> Arch:
    """Return the architecture of the backbone whose names begin with ``prefix``.

    The tensors do not hold the exponent and factor of the ghost filters. A single set of filters is
    taken as additive with factor 1, as in all published models.

    Raises:
        UsageError: tensors contradict each other.
    """
    embed_dim = _shape(tensors, f"{prefix}patch_embed.proj.weight", 4)[0]
    stages = _count(tensors, f"{prefix}layers.")
    depths = [_count(tensors, f"{prefix}layers.{stage}.blocks.") for stage in range(stages)]
    if stages < 2 or 0 in depths:
        raise UsageError(f"its backbone has {stages} stages with {depths} blocks")
    first = f"{prefix}layers.0.blocks.0.attn."
    _, group_width, kernel_size, _ = _shape(tensors, f"{first}attn.0.weight", 4)
    heads = []
    for stage in range(stages - 1):
        name = f"{prefix}layers.{stage}.blocks.0.attn.attn.2.weight"
        heads.append(_shape(tensors, name, 4)[0] // kernel_size**2)
    last = f"{prefix}layers.{stages - 1}.blocks.0.attn."
    if f"{last}attn.0.weight" in tensors:
        raise UsageError(
            f"its backbone ends with stage {stages - 1} of ELSA: it was built without the stages "
            "after it, whose outputs its model does not use, and fits no other model"
        )
    last_heads, span = _shape(tensors, f"{last}rb", 2)
    ghost = tensors.get(f"{first}ghost_head")
    two = ghost is not None and ghost.dim() == 5
    try:
        return Arch(
            embed_dim=embed_dim,
            depths=tuple(depths),
            num_heads=(*heads, last_heads),
            group_width=group_width,
            kernel_size=kernel_size,
            lam=1 if two else 0,
            gamma=0 if ghost is None else 1,
            window_size=(isqrt(span) + 1) // 2,
        )
    except ValueError as error:
        raise UsageError(f"its backbone is no ELSA-Swin: {one_line(error)}") from error


def arch_name(arch: Arch) -> str:
    """Return "tiny", "small", "base" or "custom"."""
    return next((name for name, known in VARIANTS.items() if known == arch), "custom")


def backbone_shapes(arch: Arch, prefix: str = "") -> Shapes:
    """Return the shapes of a backbone with all output norms, without the original's buffers.

    They are written out, because a model on the meta device makes PyTorch import 150 MB of modules.
    """
    table = ShapeTable()
    last = len(arch.depths) - 1
    table.layer(f"{prefix}patch_embed.proj", arch.embed_dim, 3, 4, 4)
    table.layer(f"{prefix}patch_embed.norm", arch.embed_dim)
    for stage, dim in enumerate(arch.num_features):
        for block in range(arch.depths[stage]):
            name = f"{prefix}layers.{stage}.blocks.{block}"
            table.layer(f"{name}.norm1", dim)
            add = _add_window_attention if stage == last else _add_elsa
            add(table, f"{name}.attn", arch, dim, arch.num_heads[stage])
            table.layer(f"{name}.norm2", dim)
            table.layer(f"{name}.mlp.fc1", 4 * dim, dim)
            table.layer(f"{name}.mlp.fc2", dim, 4 * dim)
        if stage < last:
            name = f"{prefix}layers.{stage}.downsample"
            table.layer(f"{name}.norm", 4 * dim)
            table.layer(f"{name}.reduction", 2 * dim, 4 * dim, bias=False)
        table.layer(f"{prefix}norm{stage}", dim)
    return table.shapes


def _add_elsa(table: ShapeTable, name: str, arch: Arch, dim: int, heads: int) -> None:
    dim_qk = -(-(dim // 3 * 2) // arch.group_width) * arch.group_width
    area = arch.kernel_size**2
    filters = (1, dim, arch.kernel_size, arch.kernel_size)
    if arch.lam or arch.gamma:
        both = arch.lam and arch.gamma
        table.shapes[f"{name}.ghost_head"] = (2, *filters) if both else filters
    table.layer(f"{name}.pre_proj", 2 * dim_qk + dim, dim, 1, 1)
    table.layer(f"{name}.attn.0", dim_qk, arch.group_width, arch.kernel_size, arch.kernel_size)
    table.layer(f"{name}.attn.2", area * heads, dim_qk, 1, 1)
    table.layer(f"{name}.post_proj", dim, dim)


def _add_window_attention(table: ShapeTable, name: str, arch: Arch, dim: int, heads: int) -> None:
    table.shapes[f"{name}.rb"] = (heads, (2 * arch.window_size - 1) ** 2)
    table.layer(f"{name}.pre_proj", 3 * dim, dim)
    table.layer(f"{name}.post_proj", dim, dim)


def read_sizes(tensors: Mapping[str, Tensor], kind: str) -> HeadSizes:
    """Read the sizes of the heads. Raise UsageError if a tensor is missing or malformed."""
    return _segmentor_sizes(tensors) if kind == UPERNET else _detector_sizes(tensors, kind)


def model_shapes(arch: Arch, sizes: HeadSizes, kind: str) -> Shapes:
    """Return the shapes of a whole model of ``kind``, with OpenMMLab's names."""
    table = ShapeTable(backbone_shapes(arch, "backbone."))
    if kind == UPERNET:
        _add_segmentor(table, arch, sizes)
    else:
        _add_detector(table, arch, sizes, kind)
    return table.shapes


def _detector_sizes(tensors: Mapping[str, Tensor], kind: str) -> HeadSizes:
    cascade = ".0" if kind == CASCADE else ""
    box, mask = f"roi_head.bbox_head{cascade}.", f"roi_head.mask_head{cascade}."
    convs = _count(tensors, f"{box}shared_convs.")
    return HeadSizes(
        num_classes=_shape(tensors, f"{box}fc_cls.weight", 2)[0] - 1,
        channels=_shape(tensors, "neck.lateral_convs.0.conv.weight", 4)[0],
        neck_norm=next(
            (n for n in ("bn", "gn") if f"neck.lateral_convs.0.{n}.weight" in tensors), ""
        ),
        anchors=_shape(tensors, "rpn_head.rpn_cls.weight", 4)[0],
        fc_dim=_shape(tensors, f"{box}shared_fcs.0.weight", 2)[0],
        box_convs=convs,
        box_conv_dim=_shape(tensors, f"{box}shared_convs.0.conv.weight", 4)[0] if convs else None,
        box_fcs=_count(tensors, f"{box}shared_fcs."),
        mask_convs=_count(tensors, f"{mask}convs."),
        mask_dim=_shape(tensors, f"{mask}upsample.weight", 4)[0],
        stages=_count(tensors, "roi_head.bbox_head.") if cascade else 1,
    )


def _add_detector(table: ShapeTable, arch: Arch, sizes: HeadSizes, kind: str) -> None:
    channels, anchors = sizes.channels or 0, sizes.anchors or 0
    for level, dim in enumerate(arch.num_features):
        table.block(f"neck.lateral_convs.{level}", channels, dim, 1, 1, norm=sizes.neck_norm)
        table.block(f"neck.fpn_convs.{level}", channels, channels, 3, 3, norm=sizes.neck_norm)
    table.layer("rpn_head.rpn_conv", channels, channels, 3, 3)
    table.layer("rpn_head.rpn_cls", anchors, channels, 1, 1)
    table.layer("rpn_head.rpn_reg", 4 * anchors, channels, 1, 1)
    for stage in range(sizes.stages):
        part = f".{stage}" if kind == CASCADE else ""
        _add_box_head(table, f"roi_head.bbox_head{part}", sizes)
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
    arch = read_arch(tensors, "backbone.")
    aux = stage = None
    if any(name.startswith("auxiliary_head.") for name in tensors):
        aux, aux_in, _, _ = _shape(tensors, "auxiliary_head.convs.0.conv.weight", 4)
        if aux_in not in arch.num_features:
            raise UsageError(
                "the auxiliary head must take one of the backbone's maps, which have "
                f"{arch.num_features} channels, got {aux_in}"
            )
        stage = arch.num_features.index(aux_in)
    return HeadSizes(
        num_classes=_shape(tensors, "decode_head.conv_seg.weight", 4)[0],
        channels=_shape(tensors, "decode_head.bottleneck.conv.weight", 4)[0],
        pool_modules=_count(tensors, "decode_head.psp_modules."),
        aux_channels=aux,
        aux_stage=stage,
    )


def _add_segmentor(table: ShapeTable, arch: Arch, sizes: HeadSizes) -> None:
    channels, classes = sizes.channels or 0, sizes.num_classes or 0
    *dims, top = arch.num_features
    head = "decode_head"
    table.layer(f"{head}.conv_seg", classes, channels, 1, 1)
    for index in range(sizes.pool_modules):
        table.block(f"{head}.psp_modules.{index}.1", channels, top, 1, 1, norm="bn")
    pooled = top + sizes.pool_modules * channels
    table.block(f"{head}.bottleneck", channels, pooled, 3, 3, norm="bn")
    for index, dim in enumerate(dims):
        table.block(f"{head}.lateral_convs.{index}", channels, dim, 1, 1, norm="bn")
        table.block(f"{head}.fpn_convs.{index}", channels, channels, 3, 3, norm="bn")
    stacked = (len(dims) + 1) * channels
    table.block(f"{head}.fpn_bottleneck", channels, stacked, 3, 3, norm="bn")
    if sizes.aux_channels is not None:
        aux_in = arch.num_features[sizes.aux_stage or 0]
        table.block("auxiliary_head.convs.0", sizes.aux_channels, aux_in, 3, 3, norm="bn")
        table.layer("auxiliary_head.conv_seg", classes, sizes.aux_channels, 1, 1)
