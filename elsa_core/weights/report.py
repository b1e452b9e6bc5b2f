"""Reports of a conversion, for people and for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from .convert import Conversion
from .shapes import arch_name

_SHOWN = 4


def text(conversion: Conversion, *, verbose: bool = False) -> str:
    """Return the report as text; ``verbose`` lists every tensor."""
    source = conversion.source
    arch = source.arch
    values = sum(conversion.tensors[name].numel() for name in conversion.moved)
    lines = [
        f"source: {source}",
        f"  embed_dim {arch.embed_dim}, depths {_join(arch.depths)}, heads {_join(arch.num_heads)}"
        f", window {arch.window_size}"
        + (f", {conversion.sizes.num_classes} classes" if conversion.sizes else ""),
        f"converted: {len(conversion.moved)} tensors, {values / 1e6:.1f}M values",
    ]
    if verbose:
        lines += [f"  {old} -> {new}" for new, old in conversion.moved.items()]
    parts = {
        "dropped": conversion.dropped,
        "added": conversion.added,
        "left to initialisation": conversion.absent,
    }
    for title, entries in parts.items():
        for reason in dict.fromkeys(reason for _, reason in entries):
            names = [name for name, why in entries if why == reason]
            shown = names if verbose or len(names) <= _SHOWN + 1 else names[:_SHOWN]
            rest = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
            lines.append(f"{title}: {len(names)} ({reason}): {', '.join(shown)}{rest}")
    return "\n".join(lines)


def record(conversion: Conversion) -> dict[str, Any]:
    """Return the whole report in JSON types."""
    source = conversion.source
    return {
        "source": str(source),
        "kind": source.kind,
        "to": conversion.to,
        "arch": {"name": arch_name(source.arch), **dataclasses.asdict(source.arch)},
        "sizes": dataclasses.asdict(conversion.sizes) if conversion.sizes else None,
        "converted": conversion.moved,
        "dropped": dict(conversion.dropped),
        "added": dict(conversion.added),
        "left_to_initialisation": dict(conversion.absent),
    }


def _join(numbers: tuple[int, ...]) -> str:
    return "-".join(map(str, numbers))
