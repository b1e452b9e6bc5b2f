"""Trainings that end between two iterations and can be resumed there."""

from __future__ import annotations

import logging
import os
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from elsa_core.errors import UsageError
from elsa_core.stop import FAILED, Ended, StopSignals, largest, stopped

from .checkpoint import AtomicCheckpointer

logger = logging.getLogger(__name__)
CANNOT_SAVE = 1000


class CarefulCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's, but a failure to save waits until `StopHook` tells the other processes.

    Attributes:
        failure: what went wrong, "" if nothing did.
    """

    failure = ""

    def after_step(self) -> None:
        try:
            super().after_step()
        except UsageError as error:
            self.failure = str(error)


class StopHook(HookBase):
    """Ends a training in all processes when one has been sent SIGTERM or SIGUSR1, or cannot save.

    The iteration in progress is finished and saved. An evaluation between two iterations is broken
    off in a single process, several processes finish it first; the last evaluation of all is left
    to the signal. Belongs right after the checkpointer's hook.

    Args:
        checkpointer: saves the state.
        periodic: the checkpointer's hook, None in processes that have none.
    """

    def __init__(
        self, checkpointer: AtomicCheckpointer, periodic: CarefulCheckpointer | None
    ) -> None:
        self.checkpointer, self.periodic = checkpointer, periodic
        self.signals = StopSignals()

    def before_train(self) -> None:
        self.signals.listen()
        if comm.get_world_size() == 1:
            self.trainer.model.register_forward_pre_hook(self._in_evaluation)

    def after_step(self) -> None:
        failure = self.periodic.failure if self.periodic else ""
        # One reduction for both; there is no signal of this number.
        state = largest(CANNOT_SAVE if failure else self.signals.received)
        if state == CANNOT_SAVE:
            raise self._failed(failure)
        if state and self.trainer.iter + 1 < self.trainer.max_iter:
            self._stop(state)

    def after_train(self) -> None:
        self.signals.close()
        finished = self.trainer.iter >= self.trainer.max_iter
        if finished and (number := self.signals.agreed()):  # only the evaluation is left to do
            raise stopped(number, self.checkpointer.get_checkpoint_file())

    def _in_evaluation(self, model: nn.Module, inputs: Any) -> None:
        if self.signals.received and not model.training:
            number, self.signals.received = self.signals.received, 0
            if self.trainer.iter + 1 < self.trainer.max_iter:
                self._stop(number)

    def _stop(self, number: int) -> None:
        name = f"model_{self.trainer.iter:07d}"
        path = os.path.join(self.checkpointer.save_dir, f"{name}.pth")
        failure = ""
        if comm.is_main_process() and self._last() != path:
            try:
                self.checkpointer.save(name, iteration=self.trainer.iter)
            except UsageError as error:
                failure = str(error)
        if largest(bool(failure)):
            raise self._failed(failure)
        end = stopped(number, path)
        logger.warning(end.sentence)
        raise end

    def _last(self) -> str:
        known = self.checkpointer.has_checkpoint()
        return self.checkpointer.get_checkpoint_file() if known else ""

    def _failed(self, failure: str) -> Ended:
        hint = f"; --resume goes on from {last}" if (last := self._last()) else ""
        end = Ended(FAILED, f"the checkpoint {failure or 'of the main process'}{hint}")
        logger.error(end.sentence)
        return end
