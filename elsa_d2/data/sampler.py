"""The order of the training images, which a resumed training continues."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from elsa_core.runtime.randomness import Placed, PlacedData, seed_all


class ContinuedSampler(TrainingSampler):
    """Detectron2's infinite shuffle, from any position on.

    Attributes:
        done: number of images, of all processes, to skip at the beginning.
    """

    done = 0

    @property
    def seed(self) -> int:
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = value

    def __iter__(self) -> Iterator[int]:
        start = self.done + self._rank
        rest = itertools.islice(self._infinite_indices(), start, None, self._world_size)
        for number, index in enumerate(rest):
            yield Placed(index, f"{self._seed}/{start + number * self._world_size}")


class DataOrderHook(HookBase):
    """Stores the seed of the shuffle in checkpoints, and continues the order when resumed.

    Detectron2 starts again with the first images of the shuffle and other random numbers. Here the
    random numbers of an iteration follow from the seed and the iteration's number. With
    DATALOADER.ASPECT_RATIO_GROUPING, some images of neighbouring batches change places.

    Args:
        batch_size: images of all processes in an iteration.
    """

    def __init__(self, sampler: ContinuedSampler, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self._begins = False  # an iteration, whose images may have to be loaded yet

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.sampler.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.seed = state["seed"]

    def before_train(self) -> None:
        self.sampler.done = self.trainer.start_iter * self.batch_size
        self.trainer.model.register_forward_pre_hook(self._seed)

    def before_step(self) -> None:
        self._begins = True

    def _seed(self, model: nn.Module, inputs: Any) -> None:
        # Not before the images are loaded: without workers, that seeds this process, too.
        if self._begins:
            self._begins = False
            seed_all(f"{self.sampler.seed}/{comm.get_rank()}/{self.trainer.iter}")


def continue_order(loader: DataLoader, batch_size: int) -> DataOrderHook | None:
    """Puts a `ContinuedSampler` into a training loader, and seeds the augmentation of each image by
    its position. Returns None for a loader with a sampler of another kind."""
    dataset: Any = loader.dataset
    sampler: Any = getattr(dataset, "sampler", None)
    if type(sampler) is not TrainingSampler:
        return None
    continued = ContinuedSampler(sampler._size, sampler._shuffle, sampler._seed)
    dataset.sampler = continued
    dataset.dataset = PlacedData(dataset.dataset)
    return DataOrderHook(continued, batch_size)


def torch_loader(loader: Any) -> DataLoader:
    """Returns PyTorch's loader inside Detectron2's."""
    while not isinstance(loader, DataLoader):
        loader = loader.dataset
    return loader
