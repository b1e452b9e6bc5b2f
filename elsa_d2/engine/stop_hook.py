"""Hooks that end a training between two iterations, where it can be resumed."""

from __future__ import annotations

import logging
import os
from typing import Any, NoReturn

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.finite import FiniteWatch, first_nonfinite, spoilt
from elsa_core.runtime.preemption import (
    FAILED,
    REFUSED,
    StopSignals,
    TrainingEnded,
    ended_by_signal,
    max_over_ranks,
    resume_hint,
)
from elsa_d2.checkpoint import AtomicCheckpointer

logger = logging.getLogger(__name__)
CANNOT_SAVE = 1000


class CarefulCheckpointer(hooks.PeriodicCheckpointer):
    """PeriodicCheckpointer that leaves it to `StopHook` to report a failure to all processes.

    Nothing is saved at iterations whose losses or gradients are not finite.

    Attributes:
        failure: the error of the last save, or "".
    """

    failure = ""

    def __init__(self, checkpointer: AtomicCheckpointer, period: int, watch: FiniteWatch) -> None:
        super().__init__(checkpointer, period)
        self.watch = watch

    def after_step(self) -> None:
        if self.watch.bad:
            return
        try:
            super().after_step()
        except UsageError as error:
            self.failure = str(error)


class FinalEvalHook(hooks.EvalHook):
    """EvalHook without the evaluation after a training that failed in its last iteration, or that
    ended early, after an evaluation."""

    evaluated = -1

    def _do_eval(self) -> None:
        super()._do_eval()
        self.evaluated = self.trainer.iter + 1

    def after_train(self) -> None:
        finished = self.trainer.iter >= self.trainer.max_iter
        self._eval_after_train &= finished and self.evaluated != self.trainer.iter
        super().after_train()


class StopHook(HookBase):
    """Ends a training in all processes, on a preemption or failure of any of them.

    On SIGTERM or SIGUSR1 (preemption), the current iteration is completed and saved. A single
    process aborts an evaluation between two iterations; several processes complete it first. After
    the last iteration, the signal ends the run without the final evaluation. Failures are a
    checkpoint that cannot be saved, and too many non-finite losses or gradients in a row.

    Register this hook right after the checkpointer's.

    Args:
        checkpointer: saves the state.
        periodic: hook of the checkpointer; None in processes without one.
        watch: counts non-finite losses and gradients.
    """

    def __init__(
        self,
        checkpointer: AtomicCheckpointer,
        periodic: CarefulCheckpointer | None,
        watch: FiniteWatch,
    ) -> None:
        self.checkpointer, self.periodic, self.watch = checkpointer, periodic, watch
        self.signals = StopSignals()

    def before_train(self) -> None:
        if name := first_nonfinite(self.checkpointer.model):
            source = self.checkpointer.last or self.trainer.cfg.MODEL.WEIGHTS or "the model"
            raise TrainingEnded(
                REFUSED, f"{source} cannot be trained: {name} holds NaN or infinity"
            )
        self.signals.listen()
        if comm.get_world_size() == 1:
            averaged = self.checkpointer.averaged
            for model in (self.trainer.model, averaged and averaged.module):
                if model is not None:
                    model.register_forward_pre_hook(self._in_evaluation)

    def after_step(self) -> None:
        failure = self.periodic.failure if self.periodic else ""
        # One reduction for both; there is no signal of this number.
        state = max_over_ranks(CANNOT_SAVE if failure else self.signals.received)
        if state == CANNOT_SAVE:
            self._fail(self._cannot_save(failure))
        done, last = self.trainer.iter + 1, self.trainer.iter + 1 >= self.trainer.max_iter
        if self.watch.at_limit or self.watch.bad and last:
            self._fail(self.watch.ended(done, self.checkpointer.last))
        if self.watch.recovered:
            name = first_nonfinite(self.checkpointer.model)
            if max_over_ranks(bool(name)):
                self._fail(spoilt(name, done, self.checkpointer.last))
        # What is not finite is not saved: the signal waits for the end of that.
        if state and not last and not self.watch.bad:
            self._stop(state)

    def after_train(self) -> None:
        self.signals.close()
        finished = self.trainer.iter >= self.trainer.max_iter
        if finished and (number := self.signals.any_rank_got()):  # the evaluation is left
            raise ended_by_signal(number, self.checkpointer.last)

    def _in_evaluation(self, model: nn.Module, inputs: Any) -> None:
        if self.signals.received and not model.training and not self.watch.bad:
            number, self.signals.received = self.signals.received, 0
            if self.trainer.iter + 1 < self.trainer.max_iter:
                self._stop(number)

    def _stop(self, number: int) -> None:
        name = f"model_{self.trainer.iter:07d}"
        path = os.path.join(self.checkpointer.save_dir, f"{name}.pth")
        failure = ""
        if comm.is_main_process() and self.checkpointer.last != path:
            try:
                self.checkpointer.save(name, iteration=self.trainer.iter)
            except UsageError as error:
                failure = str(error)
        if max_over_ranks(bool(failure)):
            self._fail(self._cannot_save(failure))
        end = ended_by_signal(number, path)
        logger.warning(end.sentence)
        raise end

    def _cannot_save(self, failure: str) -> TrainingEnded:
        hint = resume_hint(self.checkpointer.last)
        return TrainingEnded(FAILED, f"the checkpoint {failure or 'of the main process'}{hint}")

    def _fail(self, end: TrainingEnded) -> NoReturn:
        if comm.is_main_process():
            logger.error(end.sentence)
        raise end
