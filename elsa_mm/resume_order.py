"""The order of the training images, which a resumed training continues."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from mmengine.dist import get_rank
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from elsa_core.runtime.randomness import PlacedData, PlacedSampler, seed_all


class RestOfEpoch:
    """A batch sampler whose first pass skips batches; later passes are complete.

    Args:
        batches: the batch sampler.
        done: number of batches to skip.
    """

    def __init__(self, batches: Any, done: int) -> None:
        self.batches, self.done, self.begun = batches, done, False
        self.sampler = batches.sampler  # MMEngine tells it the epoch
        self.batch_size = getattr(batches, "batch_size", None)

    def __iter__(self) -> Iterator[list[int]]:
        if self.begun:
            self.done = 0
        self.begun = True
        return itertools.islice(iter(self.batches), self.done, None)

    def __len__(self) -> int:
        return len(self.batches) - self.done


def continue_order(runner: Any) -> None:
    """Makes a resumed training see the images that the interrupted one would have seen next, with
    the same augmentation.

    MMEngine continues the order only of `IterBasedTrainLoop`, and only with a seed in the config.
    It starts an interrupted epoch again, and counts its iterations twice.
    """
    loop = runner.train_loop
    loader = loop.dataloader
    samplers: tuple[Any, Any] = loader.sampler, getattr(loader.batch_sampler, "sampler", None)
    for sampler in samplers if loop.iter else ():
        if hasattr(sampler, "seed") and getattr(runner, "seed", None) is not None:
            if not (runner.cfg.get("randomness") or {}).get("diff_rank_seed"):
                sampler.seed = runner.seed
    if isinstance(loader.dataset, IterableDataset):
        return
    done = 0
    if isinstance(loop, EpochBasedTrainLoop):
        done = loop.iter - loop.epoch * len(loop.dataloader)
    loop.dataloader = _placed(loop.dataloader, done if done < len(loop.dataloader) else 0)
    if hasattr(loop, "dataloader_iterator"):
        loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)


def seed_iteration(runner: Any) -> None:
    """Derives the model's random numbers from the seed and the number of the iteration."""
    seed_all(f"{runner.seed}/{get_rank()}/{runner.iter}")


def _placed(loader: DataLoader, done: int) -> DataLoader:
    """A loader in which the augmentation of an image depends on its place in the order.

    Args:
        done: number of batches that the first epoch skips.
    """
    batches: Any = loader.batch_sampler
    sampler = PlacedSampler(batches.sampler, str(get_rank()))
    if type(batches) is BatchSampler and done <= 0:
        kept: dict[str, Any] = {"batch_size": batches.batch_size, "sampler": sampler}
        kept["drop_last"] = batches.drop_last
    else:
        batches = copy.copy(batches)
        batches.sampler = sampler
        kept = dict(batch_sampler=RestOfEpoch(batches, done) if done > 0 else batches)
    return DataLoader(
        PlacedData(loader.dataset),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        timeout=loader.timeout,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        **kept,
    )
