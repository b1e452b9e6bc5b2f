"""A problem of an annotation file, and functions to show foreign values in messages."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

ERROR, WARNING = "error", "warning"
# How far boxes and polygons may reach, in longer sides of the image: pycocotools counts in 32 bits.
FARTHEST = 10

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 60, 60, 40


@dataclass(frozen=True)
class Problem:
    """One problem of one entry.

    Args:
        level: "error": training or evaluation would fail or be wrong; "warning": repaired in
            memory or left out, in both frameworks alike.
        rule: name of the rule, for programs.
        many: sentence about all problems of the kind, with {n} for their number.
        name: name of the entry.
        one: rest of a sentence that begins with the entry's name; "" to use `many`.
        value: value of the entry, shown after its name in the examples for `many`.
    """

    level: str
    rule: str
    many: str
    name: str
    one: str = ""
    value: str = ""

    @property
    def example(self) -> str:
        return self.name + self.value

    def __str__(self) -> str:
        return f"{self.name} {self.one}" if self.one else self.many


def shown(value: Any) -> str:
    """Return a value as text of bounded length, for a message."""
    return _SHORT.repr(value)


def named(value: Any) -> Any:
    """Return an id or a name of bounded length, for a message."""
    if type(value) is str:
        return value if len(value) <= 200 else f"{value[:197]}..."
    return value if type(value) is int and value.bit_length() < 64 else shown(value)


def are_numbers(values: list) -> bool:
    """Whether all values are finite numbers in the range of float32."""
    if not set(map(type, values)) <= {int, float}:
        return False
    return not values or (-1e30 < min(values) and max(values) < 1e30 and sum(values) == sum(values))
