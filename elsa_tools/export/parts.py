"""Says which part of a model cannot be exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elsa_core.runtime.errors import UsageError


def check(what: str, got: Any, *allowed: Any) -> None:
    """Raises UsageError where a part of a model, a value or a class's bases, cannot be exported."""
    values = got if isinstance(got, tuple) and got and isinstance(got[0], type) else (got,)
    if any(value is good or value == good for value in values for good in allowed):
        return
    names = [getattr(value, "__name__", repr(value)) for value in (*allowed, values[0])]
    raise UsageError(
        f"the model cannot be exported: {what} must be {' or '.join(names[:-1])}, got {names[-1]}"
    )


def only(what: str, values: Sequence[Any]) -> Any:
    """The value that all levels or stages have; UsageError where they differ."""
    different = [value for value in values if value != values[0]]
    if different:
        raise UsageError(
            f"the model cannot be exported: {what} must be the same everywhere, got {values[0]} "
            f"and {different[0]}"
        )
    return values[0]
