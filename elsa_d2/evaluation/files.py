"""Writes the files of Detectron2's evaluators completely or not at all."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager

from elsa_core.runtime.files import replacing

PREFIX = "atomic://"


class AtomicPathHandler(PathHandler):
    """Makes ``atomic://FOLDER`` a FOLDER in which a file gets its name when it is complete.

    Serves ``PathManager.open(..., "w")`` or "wb" in a with statement, as evaluators use it. If the
    process is killed, the previous content stays. Raises UsageError if a file cannot be written.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **options: Any) -> str:
        return path.removeprefix(PREFIX)

    def _mkdirs(self, path: str, **options: Any) -> None:
        os.makedirs(self._get_local_path(path), exist_ok=True)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        if mode not in ("w", "wb"):
            raise ValueError(f"{path} can only be written, mode w or wb, got {mode}")
        return _whole(self._get_local_path(path), text=mode == "w")


@contextmanager
def _whole(path: str, *, text: bool) -> Iterator[Any]:
    with replacing(path) as file:
        yield codecs.getwriter("utf-8")(file) if text else file


PathManager.register_handler(AtomicPathHandler(), allow_override=True)
