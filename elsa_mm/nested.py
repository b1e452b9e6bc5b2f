"""Finds what is inside nested configs, and inside wrappers such as RepeatDataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def walk(node: Any) -> Iterator[dict]:
    """All dicts in nested dicts, lists and tuples."""
    if isinstance(node, dict):
        yield node
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return
    for child in node:
        yield from walk(child)


def datasets_in(node: Any) -> Iterator[dict]:
    """The configs of the data sets inside wrappers."""
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from datasets_in(child)
    elif isinstance(node, dict) and ("dataset" in node or "datasets" in node):
        yield from datasets_in(node.get("dataset"))
        yield from datasets_in(node.get("datasets"))
    elif isinstance(node, dict):
        yield node


def leaves(dataset: Any) -> Iterator[Any]:
    """A data set and, if it is a wrapper, those inside."""
    yield dataset
    for child in [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or [])]:
        if child is not None:
            yield from leaves(child)
