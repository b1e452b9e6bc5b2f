"""elsa_core's way of writing files, without the rest of that package, which needs torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from typing import Any

from .errors import DataError

# Of the package that would be imported, whose own module this does not run.
_package = util.find_spec("elsa_core")
assert _package is not None and _package.submodule_search_locations
_spec = util.spec_from_file_location(
    f"{__package__}._atomic", os.path.join(_package.submodule_search_locations[0], "atomic.py")
)
assert _spec is not None and _spec.loader is not None
_atomic = util.module_from_spec(_spec)
_spec.loader.exec_module(_atomic)
sweep = _atomic.sweep


@contextmanager
def replacing(path: str, *, sweeping: bool = True) -> Iterator[Any]:
    """As `elsa_core.files.replacing`, but raises DataError."""
    try:
        with _atomic.replacing(path, sweeping=sweeping) as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
