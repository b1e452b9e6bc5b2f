"""The order of the training images, which a resumed training continues."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader


class RestOfEpoch:
    """A batch sampler without its first batches.

    Args:
        batches: the batch sampler.
        done: batches to leave out.
    """

    def __init__(self, batches: Any, done: int) -> None:
        self.batches, self.done = batches, done
        self.sampler = batches.sampler  # MMEngine tells it the epoch
        self.batch_size = getattr(batches, "batch_size", None)

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(iter(self.batches), self.done, None)

    def __len__(self) -> int:
        return len(self.batches) - self.done


def continue_order(runner: Any) -> None:
    """Lets a resumed training see the images that the interrupted one would have seen next.

    MMEngine continues the order of `IterBasedTrainLoop` alone, given a seed in the config, and
    begins an epoch again, counting its iterations once more.
    """
    loop = runner.train_loop
    if not loop.iter:
        return
    loader = loop.dataloader
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if hasattr(sampler, "seed") and getattr(runner, "seed", None) is not None:
            if not (runner.cfg.get("randomness") or {}).get("diff_rank_seed"):
                sampler.seed = runner.seed
    done = loop.iter - loop.epoch * len(loader)
    if isinstance(loop, EpochBasedTrainLoop) and 0 < done < len(loader):
        _leave_out(loop, done)


def _leave_out(loop: EpochBasedTrainLoop, done: int) -> None:
    """The next epoch of a loop begins after so many batches; the ones after it are whole."""
    whole, run_epoch = loop.dataloader, loop.run_epoch

    def run_rest() -> None:
        del loop.run_epoch
        loop.dataloader = DataLoader(
            whole.dataset,
            batch_sampler=RestOfEpoch(whole.batch_sampler, done),
            num_workers=whole.num_workers,
            collate_fn=whole.collate_fn,
            pin_memory=whole.pin_memory,
            worker_init_fn=whole.worker_init_fn,
            timeout=whole.timeout,
            prefetch_factor=whole.prefetch_factor,
        )
        try:
            run_epoch()
        finally:
            loop.dataloader = whole

    loop.run_epoch = run_rest
