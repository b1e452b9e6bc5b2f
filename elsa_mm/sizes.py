"""Evaluation batches of images of several sizes, whose padding changes the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from elsa_core.runtime.errors import UsageError

ADVICE = "set val_dataloader.batch_size and test_dataloader.batch_size to 1"


@HOOKS.register_module()
class EqualSizesHook(Hook):
    """Warns once of an evaluation batch with images of several sizes.

    Images of a batch are padded to one size, and the padding affects group normalisation and the
    borders of convolutions: scores then depend on ``batch_size``. The first evaluation batch is
    checked before a training begins.

    Raises UsageError in MMSegmentation, which cannot pad test images.
    """

    warned = False

    def before_train(self, runner: Runner) -> None:
        loader = None if runner.val_loop is None else runner.val_loop.dataloader
        if loader is not None and (loader.batch_size or 1) > 1:
            images = range(min(loader.batch_size, len(loader.dataset)))
            self._check(runner, {"inputs": [loader.dataset[index]["inputs"] for index in images]})

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._check(runner, data_batch)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._check(runner, data_batch)

    def _check(self, runner: Runner, batch: Any) -> None:
        if self.warned or len(sizes := _sizes((batch or {}).get("inputs"))) < 2:
            return
        self.warned = True
        shown = " and ".join(f"{height}x{width}" for height, width in sizes[:2])
        if runner.cfg.get("default_scope") == "mmseg":
            raise UsageError(
                f"MMSegmentation evaluates images of one size at a time, got a batch with {shown} "
                f"pixels: {ADVICE}"
            )
        runner.logger.warning(
            f"an evaluation batch has images of several sizes, such as {shown} pixels: they are "
            f"padded, so that scores depend on the batch size; {ADVICE}"
        )


def _sizes(images: Any) -> list[tuple[int, int]]:
    """Heights and widths in a list of images [C, H, W], or in the lists of its views."""
    if not isinstance(images, Sequence):  # a tensor's images have one size
        return []
    if all(isinstance(image, Tensor) for image in images):
        return list(dict.fromkeys(tuple(image.shape[-2:]) for image in images))
    return max(map(_sizes, images), key=len, default=[])
