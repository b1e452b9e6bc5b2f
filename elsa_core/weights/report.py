"""Reports of a conversion, for people and for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from .convert import Conversion
from .shapes import Backbone, describe
from .source import RGB, Source
from .volo import Volo

_SHOWN = 4


def text(conversion: Conversion, *, verbose: bool = False) -> str:
    """Return the report as text; ``verbose`` lists every tensor."""
    source = conversion.source
    classes = conversion.sizes and f", {conversion.sizes.num_classes} classes" or ""
    values = sum(conversion.tensors[name].numel() for name in conversion.moved)
    lines = [
        f"source: {source}",
        f"  {_sizes(source.backbone)}{classes}",
        *([f"  images of {source.in_chans} channels"] if source.in_chans != RGB else []),
        *_assumed(source),
        f"converted: {len(conversion.moved)} tensors, {values / 1e6:.1f}M values",
    ]
    if verbose:
        lines += [f"  {old} -> {new}" for new, old in conversion.moved.items()]
    if conversion.seeds:
        lines.append(
            _entry("converted in part", list(conversion.seeds), conversion.seeded, verbose)
        )
    if conversion.spread:
        lines.append(f"spread: {conversion.spread}")
    parts = {
        "dropped": conversion.dropped,
        "added": conversion.added,
        "left to initialisation": conversion.absent,
    }
    for title, entries in parts.items():
        for reason in dict.fromkeys(reason for _, reason in entries):
            names = [name for name, why in entries if why == reason]
            lines.append(_entry(title, names, reason, verbose))
    return "\n".join(lines)


def _entry(title: str, names: list[str], reason: str, verbose: bool) -> str:
    shown = names if verbose or len(names) <= _SHOWN + 1 else names[:_SHOWN]
    rest = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return f"{title}: {len(names)} ({reason}): {', '.join(shown)}{rest}"


def _sizes(backbone: Backbone) -> str:
    if not isinstance(backbone, Volo):
        return (
            f"embed_dim {backbone.embed_dim}, depths {_join(backbone.depths)}, "
            f"heads {_join(backbone.num_heads)}, window {backbone.window_size}"
        )
    arch = backbone.arch
    heads = "-".join("unknown" if n is None else str(n) for n in describe(backbone)["num_heads"])
    outputs = {None: "", False: ", native maps", True: ", pyramid"}[backbone.pyramid]
    return (
        f"embed_dims {_join(arch.embed_dims)}, depths {_join(arch.depths)}, heads {heads}, "
        f"images of {backbone.img_size}{outputs}"
    )


def _assumed(source: Source) -> list[str]:
    """Return what the tensors of an ELSA-VOLO do not tell."""
    backbone = source.backbone
    if not isinstance(backbone, Volo):
        return []
    heads = "the heads of the global stages"
    lines = [f"  not in the tensors: {heads}, which must be given to the model"]
    if not backbone.unknown_heads:
        lines = [f"  not in the tensors: {heads}, taken as VOLO's of these sizes"]
    if not source.is_stock:
        lines.append("  nor exponent and factor of the ghost filters and qk_scale, taken as 1")
        if backbone.arch.lam + backbone.arch.gamma == 1:
            lines.append("  nor whether a single set of ghost filters is added, as is taken")
    return [*lines, "  ELSA-VOLO is a reconstruction: no official code or weights exist"]


def record(conversion: Conversion) -> dict[str, Any]:
    """Return the whole report in JSON types."""
    source = conversion.source
    return {
        "source": str(source),
        "kind": source.kind,
        "to": conversion.to,
        "arch": describe(source.backbone),
        "sizes": dataclasses.asdict(conversion.sizes) if conversion.sizes else None,
        "converted": conversion.moved,
        "converted_in_part": dict.fromkeys(conversion.seeds, conversion.seeded),
        "spread": conversion.spread,
        "dropped": dict(conversion.dropped),
        "added": dict(conversion.added),
        "left_to_initialisation": dict(conversion.absent),
    }


def _join(numbers: tuple[int, ...]) -> str:
    return "-".join(map(str, numbers))
