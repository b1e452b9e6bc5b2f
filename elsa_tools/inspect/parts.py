"""Parameters and operations of a model, part by part."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from elsa_core import ELSASwin, ELSAVolo
from elsa_core.flops import count_flops_by_module
from elsa_core.layers import ELSA, GlobalAttention, WindowAttention
from elsa_core.runtime.errors import UsageError, one_line

from ..archs import Backbone
from ..columns import aligned
from .counting import Subject

# Stages of ELSA-Swin and of ELSA-VOLO.
_BLOCK = re.compile(r"((?:layers\.(\d+)\.blocks|network\.([0234]))\.\d+)\.(.+)")
_MERGING = re.compile(r"(?:layers\.(\d+)\.downsample|network\.1)\b")
_PROJECTIONS = "projections"
_PARTS_OF_A_BLOCK = (
    ("attn.pre_proj", _PROJECTIONS),
    ("attn.post_proj", _PROJECTIONS),
    ("attn.qkv", _PROJECTIONS),
    ("attn.proj", _PROJECTIONS),
    ("attn.attn.0", "grouped convolution"),
    ("attn.attn.2", "logits convolution"),
    ("attn", ""),  # by the kind of attention
    ("mlp", "MLPs"),
    ("norm", "norms"),
)
_ATTENTION: dict[type[nn.Module], str] = {
    ELSA: "ELSA operator, ghost filters",
    WindowAttention: "window attention",
    GlobalAttention: "global attention",
}
_ORDER = [part for _, part in _PARTS_OF_A_BLOCK if part]
_ORDER = [*_ORDER[:-2], *_ATTENTION.values(), *_ORDER[-2:], "patch merging"]
# What stands outside the stages of a backbone, by the beginning of its names.
_OUTSIDE = (
    ("patch_embed", "patch embedding"),
    ("pos_embed", "position embedding"),
    ("post_network", "class attention"),
    ("cls_token", "class attention"),
    ("upsample", "pyramid"),
    ("norm", "output norms"),
    ("head", "classifiers"),
    ("aux_head", "classifiers"),
)
_OF_BACKBONE = ("patch embedding", "stage", *(group for _, group in _OUTSIDE[1:]))


@dataclass(frozen=True)
class Part:
    """Part ``name`` of a stage or module ``group`` of the model."""

    group: str
    name: str
    parameters: int
    operations: int


def count_parts(subject: Subject, size: tuple[int, int] | None = None) -> list[Part]:
    """Counts the parts of a model for one image of ``size``, (H, W) in pixels.

    The parts are in the order of the model's modules. Raises UsageError if the model does not
    accept an image of this size.
    """
    model = subject.module
    try:
        done = count_flops_by_module(model, subject.run, size or subject.size)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{subject.name} cannot be counted: {one_line(error)[:300]}") from error
    prefix, backbone = _backbone(model)
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        totals[_place(name, prefix, backbone)][0] += parameter.numel()
    for name, operations in done.items():
        totals[_place(name, prefix, backbone)][1] += operations
    parts = [Part(*place, *total) for place, total in totals.items()]
    groups = list(dict.fromkeys(part.group for part in parts))
    # The backbone before a pyramid that holds it, the parts of a block in the order of the data.
    groups.sort(key=_order_of_group)
    return sorted(
        parts,
        key=lambda p: (groups.index(p.group), _ORDER.index(p.name) if p.name else 0),
    )


def _order_of_group(group: str) -> int:
    found = (i for i, start in enumerate(_OF_BACKBONE) if group.startswith(start))
    return next(found, len(_OF_BACKBONE))


def _backbone(model: nn.Module) -> tuple[str, Backbone | None]:
    """Returns the prefix of the names of the model's backbone, and the backbone if it has one."""
    for name, module in model.named_modules():
        if isinstance(module, (ELSASwin, ELSAVolo)):
            return f"{name}." if name else "", module
    return "", None


def _place(name: str, prefix: str, backbone: Backbone | None) -> tuple[str, str]:
    """Returns group and name of the part that a module, or a parameter, belongs to."""
    if backbone is None or not name.startswith(prefix):
        names = name.split(".")
        depth = 2 if names[0] in ("roi_head", "roi_heads") else 1
        if names[0] == "backbone":  # what Detectron2 has around a backbone
            return "backbone.fpn", ""
        return ".".join(names[:depth]) or "model", ""
    name = name.removeprefix(prefix)
    if match := _BLOCK.fullmatch(name):
        block, swin, volo, rest = match.groups()
        stage = int(swin) + 1 if swin else max(1, int(volo))
        part = next(part for start, part in _PARTS_OF_A_BLOCK if rest.startswith(start))
        return f"stage {stage}", part or _ATTENTION[type(backbone.get_submodule(f"{block}.attn"))]
    if match := _MERGING.match(name):
        return f"stage {int(match[1] or 0) + 1}", "patch merging"
    return next(group for start, group in _OUTSIDE if name.startswith(start)), ""


def _sums(parts: list[Part]) -> tuple[int, int]:
    """Returns the parameters and the operations of several parts."""
    return sum(part.parameters for part in parts), sum(part.operations for part in parts)


def table(subject: Subject, parts: list[Part], size: tuple[int, int]) -> str:
    """Returns a table of the parts under their groups, with their shares of the total."""
    parameters, operations = _sums(parts)

    def row(name: str, members: list[Part]) -> tuple[str, ...]:
        own, done = _sums(members)
        return (
            name,
            f"{own:,}",
            f"{100 * own / parameters:.1f} %",
            f"{done / 1e9:.3f} G",
            f"{100 * done / operations:.1f} %",
        )

    groups: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        groups[part.group].append(part)
    rows: list[tuple[str, ...]] = [("part", "parameters", "", "multiply-adds", "")]
    for group, members in groups.items():
        rows.append(row(group, members))
        rows += [row(f"  {member.name}", [member]) for member in members if member.name]
    rows.append(row("total", parts))
    lines = aligned(rows, right=range(1, 5))
    rule = "-" * max(map(len, lines))
    heading = f"{subject.name}, one image of {size[0]}x{size[1]} pixels (height x width)"
    return "\n".join([heading, "", lines[0], rule, *lines[1:-1], rule, lines[-1]])


def record(subject: Subject, parts: list[Part], size: tuple[int, int]) -> dict[str, Any]:
    """Returns the counts in JSON types; operations are multiply-adds."""
    parameters, operations = _sums(parts)
    return {
        "model": subject.name,
        "size": list(size),
        "parameters": parameters,
        "operations": operations,
        "parts": [vars(part) for part in parts],
    }
