"""How long a model and its test pipeline take for an image."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any


class Times:
    """Of each image: seconds of the model alone, and of the whole prediction, from the image in
    memory to its results, before anything is drawn."""

    def __init__(self) -> None:
        self.model: list[float] = []
        self.whole: list[float] = []

    def add(self, model: float, whole: float) -> None:
        self.model.append(model)
        self.whole.append(whole)

    def record(self) -> dict[str, Any] | None:
        """Medians in milliseconds, without the first image if there are others; None: no image."""
        if not self.whole:
            return None
        return {
            "images": len(self.whole),
            "model_ms": _milliseconds(self.model),
            "image_ms": _milliseconds(self.whole),
        }


def _milliseconds(seconds: Sequence[float]) -> float:
    return round(1e3 * median(seconds[1:] or seconds), 2)


@contextmanager
def forward_times(model: Any) -> Iterator[list[float]]:
    """A list that gets the seconds of each call of a torch module within the context."""
    import torch

    found: list[float] = []

    def now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(*_: Any) -> None:
        found.append(-now())

    def end(*_: Any) -> None:
        found[-1] += now()

    hooks = model.register_forward_pre_hook(begin), model.register_forward_hook(end)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
