"""Convert checkpoints. Each tensor is converted, dropped for a reason, or causes an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elsa_core.layers import query_channels, relative_position_id
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.nonfinite import check_finite
from elsa_core.variants import Arch

from .names import CASCADE, MASK_RCNN, UPERNET, rename
from .shapes import HeadSizes, backbone_shapes, model_shapes, output_dims, read_sizes
from .source import BACKBONE, CLASSIFIER, DETECTRON2, SWIN, VOLO, Source
from .tables import OPTIONAL_LEAF, Shapes, ShapeTable
from .volo import CLASS_PARTS, OUTPUTS, Volo, add_class_parts, tops_of
from .volo_start import block_of, complete, warm_shapes

MODELS = (MASK_RCNN, CASCADE, UPERNET)
# Kinds of source for each target.
TARGETS: dict[str, tuple[str, ...]] = {
    "backbone": (),  # any kind
    "detectron2": MODELS,
    "mmdet": (MASK_RCNN, CASCADE),
    "mmseg": (UPERNET,),
    "mmpretrain": (CLASSIFIER,),
    "original": (*MODELS, CLASSIFIER, BACKBONE),
}
_NO_ORIGINAL = "; no original release of ELSA-VOLO exists, only its classifier has VOLO's names"
_NEW_NORM = "a new output norm of weight 1 and bias 0, which a classifier does not have"
_NEW_UPSAMPLE = "a pyramid's, which a classifier does not have"
_NEW_ATTENTION = "ELSA's attention, which VOLO does not have"
_SEEDED = "their last rows are VOLO's projection to the value, those of query and key before them "
SEEDED_IN_MODEL = _SEEDED + "keep the model's initialisation"
SEEDED_IN_FILE = _SEEDED + "are drawn as PyTorch initialises convolutions, with a fixed seed"
# Anchors per position in all published models: one size, three ratios.
_PUBLISHED_ANCHORS = 3


@dataclass
class Conversion:
    """A converted checkpoint.

    ``tensors``: {name in DST: tensor}, ``moved``: {name in DST: name in SRC}, ``dropped``:
    [(name in SRC, reason)], ``added``: [(name in DST, reason)]: in DST without being in SRC,
    ``absent``: [(name, reason)]: neither in SRC nor in DST, left to the model's initialisation.
    ``seeds``: {name in DST: tensor}: its last rows, where only these are from SRC, as `seeded`
    says. ``spread``: a note if the first convolution has been fitted to other channels.
    """

    source: Source
    to: str
    sizes: HeadSizes | None = None
    anchor_sizes: int | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    added: list[tuple[str, str]] = field(default_factory=list)
    absent: list[tuple[str, str]] = field(default_factory=list)
    seeds: dict[str, Tensor] = field(default_factory=dict)
    seeded: str = ""
    spread: str = ""

    def put(self, name: str, old: str, tensor: Tensor) -> None:
        if name in self.tensors:
            raise UsageError(f"{old} and {self.moved.get(name)} would both become {name}")
        self.tensors[name], self.moved[name] = tensor, old

    def add(self, name: str, tensor: Tensor, reason: str) -> None:
        self.tensors[name] = tensor
        self.added.append((name, reason))


def convert(
    source: Source, to: str, *, anchor_sizes: int | None = None, keep: Collection[str] = ()
) -> Conversion:
    """Convert ``source`` to the target ``to``, one of `TARGETS`, without copying tensors.

    Args:
        anchor_sizes: anchor sizes per pyramid level, each with all ratios. Required between
            Detectron2 and OpenMMLab unless a position has three anchors: the two frameworks order
            anchors of several sizes differently.
        keep: parts of a classifier that the target "backbone" keeps, by the beginning of their
            names. The name of the last output norm stands for the classifier's norm, which gets it.
            By default that norm is new, for detection and segmentation.

    Raises:
        UsageError: ``source`` cannot be converted to the target, or tensors are missing, unknown,
            of the wrong shape, or have NaN or infinity.
    """
    if to not in TARGETS:
        raise UsageError(f"the target must be one of {', '.join(TARGETS)}, got {to}")
    if to not in (possible := _possible_targets(source)):
        raise UsageError(
            f"it is {source}, which can become {' or '.join(possible)}, got the target {to}"
            + _NO_ORIGINAL * (to == "original" and isinstance(source.backbone, Volo))
        )
    dropped = list(source.dropped)
    result = Conversion(source, to, anchor_sizes=anchor_sizes, dropped=dropped)
    if source.family == SWIN:
        _convert_swin(result)
    elif to == "backbone":
        _take_backbone(result, keep)
    elif source.kind in MODELS:
        _convert_model(result, anchor_sizes)
    else:
        _convert_classifier(result)
    check_finite(result.tensors, "it")
    return result


def _possible_targets(source: Source) -> list[str]:
    possible = [name for name, kinds in TARGETS.items() if not kinds or source.kind in kinds]
    if source.is_stock:
        allowed = {"backbone"} if source.family == SWIN else {"backbone", "mmpretrain"}
        return [name for name in possible if name in allowed]
    if isinstance(source.backbone, Volo) and source.kind != CLASSIFIER:
        possible.remove("original")
    return possible


def _convert_model(result: Conversion, anchor_sizes: int | None) -> None:
    source = result.source
    result.sizes = sizes = read_sizes(
        {name: tensor for name, (_, tensor) in source.tensors.items()}, source.kind
    )
    _check(
        source, source.tensors, model_shapes(source.backbone, sizes, source.kind, source.in_chans)
    )
    named = source.tensors
    if (source.family == DETECTRON2) != (result.to == "detectron2") and sizes.anchors:
        named = _reorder_anchors(named, sizes.anchors, anchor_sizes, result.to)
    if result.to == "detectron2":
        plain = {name: tensor for name, (_, tensor) in named.items()}
        renamed, unknown = rename(plain, source.kind, "d2")
        if unknown:
            raise UsageError(f"Detectron2 has no place for {unknown[0]}")
        for new, (name, tensor) in renamed.items():
            result.put(new, named[name][0], tensor)
        return
    for name, (old, tensor) in named.items():
        result.put(name, old, tensor)
        if result.to == "original":
            _add_bookkeeping(result, name, "backbone.")


def _convert_classifier(result: Conversion) -> None:
    """Convert a classifier or a backbone to the original's or MMPretrain's names."""
    source = result.source
    shapes = backbone_shapes(source.backbone, in_chans=source.in_chans)
    expected = {name: shape for name, shape in shapes.items() if not OUTPUTS.match(name)}
    if source.kind == CLASSIFIER:
        expected |= _class_shapes(source)
    else:
        expected |= {name: tuple(t.shape) for name, (_, t) in source.tensors.items()
                     if name in shapes}  # fmt: skip
    expected = _without_new(result, expected)
    _check(source, source.tensors, expected)
    volo = isinstance(source.backbone, Volo)
    # The classifier's norm is MMPretrain's last output norm, but with VOLO's class attention.
    last = "norm." if volo else f"norm{len(output_dims(source.backbone)) - 1}."
    for name, (old, tensor) in source.tensors.items():
        new = name
        if result.to == "mmpretrain":
            new = re.sub(r"^(aux_)?head\.", r"head.\1fc.", name)
            new = new.replace("norm.", last) if name.startswith("norm.") else new
            new = new if new.startswith("head.") else f"backbone.{new}"
        _put(result, new, old, tensor)
        if result.to == "original":
            _add_bookkeeping(result, name, "")
    if result.to == "mmpretrain":
        result.absent = [(f"backbone.{name}", reason) for name, reason in result.absent]


def _class_shapes(source: Source) -> Shapes:
    """Return the shapes of what a classifier has after the backbone."""
    table = ShapeTable()
    if isinstance(source.backbone, Volo):
        given = {name: tensor for name, (_, tensor) in source.tensors.items()}
        add_class_parts(table, source.backbone, given)
        return table.shapes
    dim = source.backbone.num_features[-1]
    table.layer("norm", dim)
    head = source.tensors.get("head.weight")
    classes = head[1].shape[:1] if head else ()
    return table.shapes | {"head.weight": (*classes, dim), "head.bias": (*classes,)}


def _take_backbone(result: Conversion, keep: Collection[str]) -> None:
    source = result.source
    whole = source.kind not in (CLASSIFIER, BACKBONE)
    expected = backbone_shapes(source.backbone, in_chans=source.in_chans)
    dims = output_dims(source.backbone)
    last = f"norm{len(dims) - 1}"
    parts = CLASS_PARTS if isinstance(source.backbone, Volo) else ("norm", "head")
    kept = set(keep) & set(parts)
    keep_norm = source.kind == CLASSIFIER and last in keep
    missing: set[str] = set()
    if not whole:
        missing = {
            name
            for name in expected
            if OUTPUTS.match(name)
            and name not in source.tensors
            and not (keep_norm and name.startswith(f"{last}."))
        }
        expected = {name: shape for name, shape in expected.items() if name not in missing}
    if source.kind == CLASSIFIER and kept:
        shapes = _class_shapes(source)
        expected |= {name: shape for name, shape in shapes.items() if name.split(".")[0] in kept}
    taken: dict[str, tuple[str, Tensor]] = {}
    for name, (old, tensor) in source.tensors.items():
        top = name.split(".")[0]
        if whole and name.startswith("backbone."):
            taken[name.removeprefix("backbone.")] = (old, tensor)
        elif keep_norm and top == "norm":
            taken[name.replace("norm.", f"{last}.")] = (old, tensor)
        elif whole or top in parts and top not in kept:
            part = "the model" if whole else "the classifier"
            result.dropped.append((old, f"part of {part}, not of the backbone"))
        else:
            taken[name] = (old, tensor)
    expected = _without_new(result, expected)
    _check(source, taken, expected)
    for name, (old, tensor) in taken.items():
        _put(result, name, old, tensor)
    if isinstance(source.backbone, Volo):
        # The channels of some depend on the model.
        if source.backbone.pyramid is None and not kept:
            missing = {f"norm{index}" for index in range(4)} - tops_of(result.tensors)
            result.absent.append(("upsample", _NEW_UPSAMPLE))
        result.absent += [(name, _NEW_NORM) for name in sorted(missing) if not kept]
        lacking = sorted(kept - tops_of(source.tensors))
        result.absent += [(name, "part of the classifier, not in the file") for name in lacking]
    else:
        for name in sorted(missing):
            length = dims[int(name.split(".")[0].removeprefix("norm"))]
            make: Callable[..., Tensor] = torch.ones if name.endswith("weight") else torch.zeros
            result.add(
                name, make(length, dtype=next(iter(result.tensors.values())).dtype), _NEW_NORM
            )


def _convert_swin(result: Conversion) -> None:
    source = result.source
    assert isinstance(source.backbone, Arch)
    expected = backbone_shapes(source.backbone, in_chans=source.in_chans)
    attention = {
        name
        for name in expected
        if ".attn." in name and not name.startswith(f"layers.{len(source.backbone.depths) - 1}.")
    }
    norms = {name for name in expected if name.startswith("norm")}
    shared = {n: shape for n, shape in expected.items() if n not in attention | norms}
    _check(source, source.tensors, shared)
    for name, (old, tensor) in source.tensors.items():
        result.put(name, old, tensor)
    result.absent += [
        (name, "ELSA's attention, which Swin does not have") for name in sorted(attention)
    ]
    result.absent += [
        (name, "an output norm, which a classifier does not have") for name in sorted(norms)
    ]


def _without_new(result: Conversion, expected: Shapes) -> Shapes:
    """Return the shapes that SRC must have; of a VOLO, note what it lacks."""
    if result.source.family != VOLO:
        return expected
    assert isinstance(result.source.backbone, Volo)
    shapes, absent = warm_shapes(expected, result.source.backbone)
    result.absent += [(name, _NEW_ATTENTION) for name in absent]
    return shapes


def _put(result: Conversion, name: str, old: str, tensor: Tensor) -> None:
    """Put a tensor, or ``pre_proj`` made of VOLO's projection to the value."""
    backbone = result.source.backbone
    if result.source.family == VOLO and ".attn.v." in name and isinstance(backbone, Volo):
        name = name.replace(".attn.v.", ".attn.pre_proj.")
        result.seeds[name], result.seeded = tensor, SEEDED_IN_FILE
        rows = 2 * query_channels(len(tensor), backbone.arch.group_width)
        tensor = complete(tensor, rows, block_of(name))
    result.put(name, old, tensor)


def _check(source: Source, given: Mapping[str, tuple[str, Tensor]], expected: Shapes) -> None:
    """Raise UsageError, with SRC's names, if tensors are missing, unknown or of wrong shape."""
    missing = [n for n in expected if n not in given and not n.endswith(OPTIONAL_LEAF)]
    if missing:
        raise UsageError(
            f"it is {source}, of which {_count(missing, 'tensor')} "
            f"{'is' if len(missing) == 1 else 'are'} missing{_first(_in_source(source, missing))}"
        )
    extra = [old for name, (old, _) in given.items() if name not in expected]
    if extra:
        raise UsageError(
            f"it is {source}, which has no place for {_count(extra, 'tensor')}{_first(extra)}"
        )
    wrong = [name for name in given if tuple(given[name][1].shape) != tuple(expected[name])]
    if wrong:
        old, tensor = given[wrong[0]]
        raise UsageError(
            f"it is {source}, but {_count(wrong, 'tensor')} must have other shapes: {old} must "
            f"have {list(expected[wrong[0]])}, got {list(tensor.shape)}"
        )
    for name, (old, tensor) in given.items():
        if tensor.is_floating_point() == name.endswith(OPTIONAL_LEAF):
            raise UsageError(f"{old} must not hold elements of type {tensor.dtype}")


def _in_source(source: Source, names: list[str]) -> list[str]:
    """Return the names that missing tensors would have in SRC."""
    if source.family == DETECTRON2 and source.kind in MODELS:
        return list(rename(dict.fromkeys(names), source.kind, "d2")[0])
    if source.family == VOLO:
        return [re.sub(r"(network\.0\.\d+\.attn\.)post_proj", r"\1proj", name) for name in names]
    return names


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"


def _first(names: list[str]) -> str:
    return f": {names[0]}" if len(names) == 1 else f", the first is {names[0]}"


def _add_bookkeeping(result: Conversion, name: str, prefix: str) -> None:
    """Add the original's ``relative_id`` after each ``rb``."""
    if name.startswith(prefix) and name.endswith(".attn.rb"):
        assert isinstance(result.source.backbone, Arch)
        index = relative_position_id(result.source.backbone.window_size)
        result.add(
            name.removesuffix("rb") + "relative_id", index, "bookkeeping that the original expects"
        )


def _reorder_anchors(
    named: Mapping[str, tuple[str, Tensor]], anchors: int, sizes: int | None, to: str
) -> dict[str, tuple[str, Tensor]]:
    """Reorder the anchors of each position: by size, then ratio in Detectron2, by ratio, then size
    in OpenMMLab."""
    if sizes is None and anchors != _PUBLISHED_ANCHORS:
        raise UsageError(
            f"its model has {anchors} anchors at each position, whose order differs between the "
            "frameworks: say with --anchor-sizes how many sizes a pyramid level has"
        )
    sizes = sizes or 1
    if sizes < 1 or anchors % sizes:
        raise UsageError(
            f"--anchor-sizes must divide the {anchors} anchors of a position, got {sizes}"
        )
    order = torch.arange(anchors)
    shape = (anchors // sizes, sizes) if to == "detectron2" else (sizes, anchors // sizes)
    order = order.reshape(shape).t().flatten()
    changed = dict(named)
    if not torch.equal(order, torch.arange(anchors)):
        for layer in ("rpn_cls", "rpn_reg"):
            for leaf in ("weight", "bias"):
                name = f"rpn_head.{layer}.{leaf}"
                old, tensor = named[name]
                changed[name] = (old, tensor.unflatten(0, (anchors, -1))[order].flatten(0, 1))
    return changed
