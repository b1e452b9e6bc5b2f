"""What may be wrong in a file of annotations, once, and how foreign values are shown."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

ERROR, WARNING = "error", "warning"
# How many times the longer side boxes and polygons may reach to: pycocotools counts in 32 bits.
FARTHEST = 10

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 60, 60, 40


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, once.

    Args:
        level: "error": training or evaluation would fail or be wrong; "warning": repaired in
            memory or left out, in both frameworks alike.
        rule: its name for programs.
        many: the sentence about all of the kind, with {n} for their number.
        name: of the entry.
        one: the rest of a sentence that begins with the entry's name; "" where `many` does.
        value: what the entry has, after its name in the examples for `many`.
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
    """A value for a message, of bounded length however large or deep it is."""
    return _SHORT.repr(value)


def named(value: Any) -> Any:
    """An id or a name for a message, of bounded length."""
    if type(value) is str:
        return value if len(value) <= 200 else f"{value[:197]}..."
    return value if type(value) is int and value.bit_length() < 64 else shown(value)


def are_numbers(values: list) -> bool:
    """Whether all are numbers, finite and of a size that float32 holds."""
    if not set(map(type, values)) <= {int, float}:
        return False
    return not values or (-1e30 < min(values) and max(values) < 1e30 and sum(values) == sum(values))
