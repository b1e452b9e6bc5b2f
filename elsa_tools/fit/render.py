"""Writes settings as a config of either framework, each with its reason as a comment."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from elsa_core.runtime.errors import printable

WIDTH = 100
# Characters that YAML refuses or reads as line breaks, also in quotes.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


class Setting(NamedTuple):
    """A value and why it is chosen."""

    value: Any
    why: str


def settings(*pairs: tuple[str, Any] | tuple[str, Any, str]) -> dict[str, Any]:
    """Return nested dicts for (dotted key, value) or (dotted key, value, why)."""
    tree: dict[str, Any] = {}
    for key, value, *why in pairs:
        *folders, name = key.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = Setting(value, why[0]) if why else value
    return tree


def yaml_text(tree: Mapping[str, Any], indent: int = 0) -> str:
    """Return YAML; values are JSON, which is YAML too."""
    lines: list[str] = []
    pad = " " * indent
    for key, value in tree.items():
        value = _commented(lines, value, indent)
        if isinstance(value, Mapping):
            lines.append(f"{pad}{key}:\n{yaml_text(value, indent + 2).rstrip()}")
            continue
        text = f"{pad}{key}: {_json(value)}"
        if len(text) > WIDTH and isinstance(value, (list, tuple)):
            items = (f"{pad}  - {_json(one)}" for one in value)
            text = "\n".join([f"{pad}{key}:", *items])
        lines.append(text)
    return "\n".join(lines) + "\n"


def python_text(tree: Mapping[str, Any]) -> str:
    """Return assignments, with a dict(...) for each mapping."""
    lines: list[str] = []
    for key, value in tree.items():
        value = _commented(lines, value, 0)
        lines.append(f"{key} = {_python(value, 0, len(key) + 3)}")
    return "\n".join(lines) + "\n"


def comment(text: str, indent: int = 0) -> str:
    """Return a comment of lines that are not too long, which MMEngine does not fill in."""
    first = " " * indent + "# "
    text = printable(text).replace("{{", "{ {")
    return textwrap.fill(
        " ".join(text.split()), WIDTH, initial_indent=first, subsequent_indent=first
    )


def _json(value: Any) -> str:
    """Return JSON that is YAML, too."""
    text = json.dumps(value, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _repr(value: Any) -> str:
    """Return an expression in which MMEngine finds no {{variable}} to fill in."""
    return repr(value).replace("{{", r"\x7b{") if isinstance(value, str) else repr(value)


def _commented(lines: list[str], value: Any, indent: int) -> Any:
    if isinstance(value, Setting):
        lines.append(comment(value.why, indent))
        return value.value
    return value


def _python(value: Any, indent: int, used: int) -> str:
    """Return an expression on one line if it ends before WIDTH, else one item a line."""
    inline = _inline(value)
    if inline is not None and indent + used + len(inline) < WIDTH:
        return inline
    pad = " " * (indent + 4)
    if isinstance(value, Mapping) and all(str(key).isidentifier() for key in value):
        lines: list[str] = []
        for key, one in value.items():
            one = _commented(lines, one, indent + 4)
            lines.append(f"{pad}{key}={_python(one, indent + 4, len(key) + 2)},")
        return "dict(\n" + "\n".join(lines) + f"\n{' ' * indent})"
    if isinstance(value, (list, tuple)) and value:
        opening, closing = "[]" if isinstance(value, list) else "()"
        items = "\n".join(f"{pad}{_python(one, indent + 4, 1)}," for one in value)
        return f"{opening}\n{items}\n{' ' * indent}{closing}"
    return _repr(value)


def _inline(value: Any) -> str | None:
    """Return an expression without line breaks; None if a part of it has a comment."""
    if isinstance(value, Setting):
        return None
    if isinstance(value, Mapping) and all(str(key).isidentifier() for key in value):
        parts = [(key, _inline(one)) for key, one in value.items()]
        if any(part is None for _, part in parts):
            return None
        return f"dict({', '.join(f'{key}={part}' for key, part in parts)})"
    if isinstance(value, list):
        items = [_inline(one) for one in value]
        return None if None in items else f"[{', '.join(map(str, items))}]"
    return _repr(value)
