"""Multiply-adds and activations of operators that counters of traced graphs do not know.

`MULTIPLY_ADDS` and `ACTIVATIONS` are for fvcore and MMEngine; `elsa_core.flops` uses PyTorch's
counter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType
from typing import Any

Shape = Sequence[int]
Handle = Callable[[list[Any], list[Any]], int]


def attention(value: Shape, kernel_size: int, ghosts: bool) -> int:
    """Count `elsa::attention`: one multiply-add per tap for the value, one for ghost filters."""
    return prod(value) * kernel_size**2 * (1 + ghosts)


def grouped_conv(query: Shape, weight: Shape) -> int:
    """Count `elsa::grouped_conv` as a convolution; the product of its maps does not count."""
    return prod(query) * prod(weight[1:])


def scaled_dot_product_attention(query: Shape, key: Shape, value: Shape) -> int:
    """Count both matrix products of [..., L, E], [..., S, E] and [..., S, C]."""
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _traced_attention(inputs: list[Any], outputs: list[Any]) -> int:
    value, _, ghost_add, ghost_mul, kernel_size = inputs[:5]
    ghosts = any(_shape(ghost) is not None for ghost in (ghost_add, ghost_mul))
    return attention(_shape(value), kernel_size.toIValue(), ghosts)


def _traced_convolution(inputs: list[Any], outputs: list[Any]) -> int:
    return grouped_conv(_shape(inputs[0]), _shape(inputs[2]))


def _traced_dot_product(inputs: list[Any], outputs: list[Any]) -> int:
    return scaled_dot_product_attention(*map(_shape, inputs[:3]))


def _size_of_output(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_shape(outputs[0]))


def _shape(value: Any) -> Any:
    """Return the shape of a tensor in a traced graph; None for None."""
    return value.type().sizes() if value.isCompleteTensor() else None


# By the operator's name in a traced graph.
MULTIPLY_ADDS: dict[str, Handle] = {
    "elsa::attention": _traced_attention,
    "elsa::grouped_conv": _traced_convolution,
    "aten::scaled_dot_product_attention": _traced_dot_product,
}
ACTIVATIONS: dict[str, Handle] = dict.fromkeys(MULTIPLY_ADDS, _size_of_output)


def register_handles(module: ModuleType, **tables: dict[str, Handle]) -> None:
    """Add handles to tables in a counter's module, by table name, without replacing any."""
    for name, handles in tables.items():
        known: dict[str, Any] = getattr(module, name, {})
        for operator, handle in handles.items():
            known.setdefault(operator, handle)
