"""Averages the weights of a training."""

from __future__ import annotations

from detectron2.engine import HookBase
from torch.optim import Optimizer

from elsa_d2.checkpoint import AtomicCheckpointer


class AveragedWeightsHook(HookBase):
    """Averages the model's weights after each step of the optimizer.

    Register this hook before those that save or evaluate.

    Args:
        checkpointer: has the model and the averaged weights, which it saves and restores.
        optimizer: of the training.
    """

    def __init__(self, checkpointer: AtomicCheckpointer, optimizer: Optimizer) -> None:
        assert checkpointer.averaged is not None
        self.model, self.averaged = checkpointer.model, checkpointer.averaged
        self.averaged.follow(optimizer)

    def before_train(self) -> None:
        self.averaged.begin(self.model)

    def after_step(self) -> None:
        self.averaged.update(self.model)
