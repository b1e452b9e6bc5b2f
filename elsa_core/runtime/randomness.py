"""Random numbers that depend on the seed and the position in the training, not on earlier draws.

A resumed training draws the same numbers as an uninterrupted one, with any number of workers. An
image's augmentation depends on its position in the sampler's order; dropout, stochastic depth and
box sampling depend on the iteration number.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset


class Placed(int):
    """A data set index with its position in the sampler's order."""

    place: str

    def __new__(cls, index: int, place: str) -> Placed:
        placed = super().__new__(cls, index)
        placed.place = place
        return placed

    def __reduce__(self) -> tuple[Any, ...]:
        return Placed, (int(self), self.place)


class PlacedSampler:
    """Wraps a sampler to yield `Placed` indices; forwards all other attributes.

    Args:
        sampler: yields the same indices for the same seed and epoch.
        name: identifies this process's order, such as its rank.
    """

    def __init__(self, sampler: Any, name: str) -> None:
        self.__dict__.update(sampler=sampler, name=name, skipped=0)

    def __iter__(self) -> Iterator[Placed]:
        seed, epoch = (getattr(self.sampler, name, 0) for name in ("seed", "epoch"))
        order = f"{self.name}/{seed}/{epoch}"
        for number, index in enumerate(self.sampler, self.skipped):
            yield Placed(index, f"{order}/{number}")

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "skip":
            return self._skip(self.__dict__["sampler"].skip)
        return getattr(_inner(self, "sampler", name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.sampler, name, value)

    def _skip(self, skip: Any) -> Any:
        def skip_and_count(number: int) -> None:
            skip(number)
            self.__dict__["skipped"] = number

        return skip_and_count


class PlacedData(Dataset):
    """Wraps a data set to seed its random transforms by the position of a `Placed` index; forwards
    all other attributes."""

    def __init__(self, dataset: Any) -> None:
        self.__dict__["dataset"] = dataset

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, Placed):
            seed_all(index.place)
        return self.dataset[int(index)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(_inner(self, "dataset", name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)


def _inner(wrapper: Any, attribute: str, name: str) -> Any:
    if name.startswith("__") or attribute not in wrapper.__dict__:  # while it is unpickled
        raise AttributeError(name)
    return wrapper.__dict__[attribute]


def seed_all(place: str) -> None:
    """Seed Python, PyTorch on all devices, and NumPy if it has been imported."""
    number = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little")
    random.seed(number)
    torch.manual_seed(number % 2**63)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(number % 2**32)
