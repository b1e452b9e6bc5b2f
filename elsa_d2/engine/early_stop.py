"""Ends a training whose evaluations get no better."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.finite import FiniteWatch
from elsa_core.runtime.patience import Patience
from elsa_core.runtime.preemption import FAILED, TrainingEnded, max_over_ranks, resume_hint
from elsa_d2.checkpoint import AtomicCheckpointer

logger = logging.getLogger(__name__)


class EndedEarly(TrainingEnded):
    """Ends a training as if the current iteration were its last."""

    def __init__(self, sentence: str) -> None:
        super().__init__(0, sentence)


class EndsEarly(TrainerBase):
    """Trainer for which `EndedEarly` is the normal end of a training."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            super().train(*args, **kwargs)
        except EndedEarly as end:
            logger.info(end.sentence)


class PatienceHook(HookBase):
    """Ends the training by the rule of `elsa_core.runtime.patience.Patience`.

    The last checkpoint is ``model_final.pth``, as at the end of any training. A resumed training
    continues to count, and ends at once if the rule has ended it already. Register this hook after
    those that evaluate and keep the best checkpoint.

    Args:
        patience: the rule.
        checkpointer: saves the state.
        period: iterations between evaluations.
        watch: at iterations whose losses or gradients are not finite, no training ends here.
    """

    def __init__(
        self, patience: Patience, checkpointer: AtomicCheckpointer, period: int, watch: FiniteWatch
    ) -> None:
        self.patience, self.checkpointer = patience, checkpointer
        self.period, self.watch = period, watch

    def before_train(self) -> None:
        done = self.trainer.start_iter
        if comm.is_main_process():
            self.patience.resume(done)
        self._end_if_due(done, "")

    def after_step(self) -> None:
        done, failure = self.trainer.iter + 1, ""
        if self.period <= 0 or done % self.period or done == self.trainer.max_iter:
            return
        if comm.is_main_process():
            score, _ = self.trainer.storage.latest()[self.patience.metric]
            try:
                self.patience.add(done, score)
            except UsageError as error:
                failure = str(error)
        self._end_if_due(done, failure)

    def _end_if_due(self, done: int, failure: str) -> None:
        verdict = "" if self.watch.bad else self.patience.verdict()
        if verdict and not failure and comm.is_main_process():
            try:
                self.checkpointer.save("model_final", iteration=done - 1)
            except UsageError as error:
                failure = f"the checkpoint {error}"
        # One reduction for both.
        state = max_over_ranks(2 if failure else int(bool(verdict)))
        if state == 2:
            self._fail(failure or "the main process cannot write")
        if state:
            self.trainer.iter = self.trainer.max_iter = done
            raise EndedEarly(verdict or "training ended early, as the main process logs")

    def _fail(self, failure: str) -> NoReturn:
        end = TrainingEnded(FAILED, failure + resume_hint(self.checkpointer.last))
        if comm.is_main_process():
            logger.error(end.sentence)
        raise end
