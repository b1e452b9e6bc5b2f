"""The class names that checkpoints carry."""

from __future__ import annotations

from typing import Any


def class_names(content: Any) -> tuple[Any, Any]:
    """Names and colours of the classes in a checkpoint of OpenMMLab, None for what is not there.

    Args:
        content: what `elsa_weights.read_checkpoint` returns.
    """
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        return None, None
    inner = meta.get("dataset_meta")
    merged = {**meta, **(inner if isinstance(inner, dict) else {})}
    data = {str(key).lower(): value for key, value in merged.items()}
    names = data.get("classes")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None, None
    return names, data.get("palette")
