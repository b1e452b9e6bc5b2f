"""What a library that quantises models must do, and the parts of a model."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any

from .calibration import Images, Run
from .record import Record

# Name of a part -> beginning of its weights' names. All other weights are the backbone's.
PARTS = {
    "FPN": "neck.",
    "RPN": "rpn_head.",
    "box head": "roi_head.bbox_head.",
    "mask head": "roi_head.mask_head.",
    "segmentation head": "head.",
}
BACKBONE = "backbone"


class Quantiser(ABC):
    """A float model that one library quantises.

    Attributes:
        path: its file.
        record: what the file says about the model.
        parts: name of a part -> names of its operators that can be int8.
    """

    path: str
    record: Record
    parts: dict[str, list[str]]

    @abstractmethod
    def quantised(self, names: Collection[str], images: Images, bar: Any) -> Any:
        """A model in which the operators of these names are int8; ``bar`` counts images."""

    @abstractmethod
    def runner(self, model: Any, threads: int | None) -> Run:
        """A quantised model, or for None the float model, to run."""

    @abstractmethod
    def write(
        self, model: Any, path: str, record: Record, check: Callable[[str], object] | None
    ) -> int:
        """Writes a quantised model; returns the size of its files in bytes."""

    @abstractmethod
    def size(self) -> int:
        """Of the float model's files."""


def part_of(weight: str) -> str:
    """The part that a weight of this name belongs to."""
    found = (part for part, beginning in PARTS.items() if weight.startswith(beginning))
    return next(found, BACKBONE)


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    """Drops what libraries print on standard output."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
