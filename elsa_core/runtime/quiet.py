"""Hide framework warnings that users of the tools can do nothing about.

Only the command lines hide them, while they run: importing the packages changes no filter.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

# Beginnings of warnings, as `warnings.filterwarnings` takes them.
WARNINGS = (
    r"torch\.meshgrid: in an upcoming release",  # Detectron2's and MMDetection's anchors
    r"The given NumPy array is not writable",  # Detectron2's masks, which it copies
    r"`torch\.jit\.(script|trace)[^`]*` is deprecated",  # fvcore's losses
    r"pkg_resources is deprecated",  # Detectron2's model zoo
    r"`?torch\.cuda\.amp\.",  # the frameworks' old name of torch.amp
    r"faster_coco_eval is not installed",  # none of our configs evaluates with it
    r"Default ``avg_non_ignore`` is False",  # MMSegmentation's loss, as published
    r"The draw is False, it means that the hook for visualization",
    r"Image size \(\d+ pixels\) exceeds limit",  # Pillow's, of half of what we read
    r"Warning: The (bbox|polygon) is out of bounds",  # of MMEngine's painter, which clips them
)
# Beginnings of log records, and the PyTorch loggers that emit them; OpenMMLab's loggers are created
# by each run.
RECORDS = (
    "is_fx_tracing will return true",
    "No CUDA runtime is found, using CUDA_HOME",
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    "The prefix is not set in metric class",
)
LOGGERS = ("torch.fx._symbolic_trace", "torch.utils.cpp_extension")
# Printed lines about an optional package of OpenMMLab's data sets.
LINES = re.compile(r"Could not import OneDL(\. Skipping OneDL datasets\.)?")


class HarmlessRecords(logging.Filter):
    """Drops RECORDS from a logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(RECORDS)


class _WithoutLines:
    """A stream that drops LINES."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._skipped = stream, False

    def write(self, text: str) -> int:
        ends, self._skipped = self._skipped and text == "\n", bool(LINES.fullmatch(text))
        return len(text) if ends or self._skipped else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def quiet_frameworks() -> Iterator[None]:
    """Hide WARNINGS, RECORDS of LOGGERS and LINES on standard output."""
    records = HarmlessRecords()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    with warnings.catch_warnings(), redirect_stdout(_WithoutLines(sys.stdout)):
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message)
        for logger in loggers:
            logger.addFilter(records)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(records)
