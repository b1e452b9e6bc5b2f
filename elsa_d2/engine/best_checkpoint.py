"""Keeps the best checkpoint of a training beside the last ones."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from elsa_core.ema import METRICS
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.finite import FiniteWatch
from elsa_core.runtime.preemption import FAILED, REFUSED, TrainingEnded, max_over_ranks, resume_hint
from elsa_core.weights import read_checkpoint
from elsa_d2.checkpoint import AtomicCheckpointer

logger = logging.getLogger(__name__)
NAME = "model_best"


class BestCheckpointHook(HookBase):
    """Saves model_best.pth after each evaluation with a higher score than all before it.

    The file holds the score, with which a resumed training compares. Detectron2's BestCheckpointer
    forgets it, makes --resume continue from the best checkpoint, and records the last iteration
    one too high. Register this hook right after the one that evaluates.

    Args:
        checkpointer: saves the state.
        metric: name in metrics.json, such as "sem_seg/mIoU"; higher is better. With "ema/" before
            it, the file has the averaged weights, otherwise the optimizer's.
        period: iterations between evaluations; 0: only after the last one.
        watch: prevents saving at iterations whose losses or gradients are not finite.

    Attributes:
        best: the highest score so far, or None.
    """

    def __init__(
        self, checkpointer: AtomicCheckpointer, metric: str, period: int, watch: FiniteWatch
    ) -> None:
        self.checkpointer, self.metric, self.period = checkpointer, metric, period
        self.watch = watch
        self.best: float | None = None

    def before_train(self) -> None:
        path = os.path.join(self.checkpointer.save_dir, f"{NAME}.pth")
        if not (comm.is_main_process() and self.trainer.start_iter and os.path.isfile(path)):
            return
        try:
            known = read_checkpoint(path)["best"]
            if known["metric"] == self.metric:
                self.best = float(known["score"])
        except Exception as error:  # whatever it is, no checkpoint of this hook
            logger.warning(f"{path} tells no best {self.metric}, and will be replaced: {error!r}")

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done != self.trainer.max_iter:
            self._compare(self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._compare(self.trainer.max_iter - 1)

    def _compare(self, iteration: int) -> None:
        end = self._save(iteration) if comm.is_main_process() else None
        if status := max_over_ranks(end.status if end else 0):
            end = end or TrainingEnded(status, f"{NAME}.pth cannot be written by the main process")
            if comm.is_main_process():
                logger.error(end.sentence)
            raise end

    def _save(self, iteration: int) -> TrainingEnded | None:
        hint = resume_hint(self.checkpointer.last)
        latest = {name: value for name, (value, _) in self.trainer.storage.latest().items()}
        if self.metric not in latest:
            task = self.metric.split("/")[:-1]
            names = ", ".join(name for name in latest if name.split("/")[:-1] == task)
            sentence = f"TEST.BEST_METRIC must be one of {names}, got {self.metric}"
            return TrainingEnded(REFUSED, sentence + hint)
        score = float(latest[self.metric])
        if not math.isfinite(score) or self.watch.bad:
            logger.warning(f"{self.metric} {score} of iteration {iteration + 1} does not count")
        elif self.best is None or score > self.best:
            extra: dict[str, Any] = {"best": {"metric": self.metric, "score": score}}
            extra["averaged"] = self.metric.startswith(METRICS)
            try:
                path = self.checkpointer.write(NAME, iteration=iteration, **extra)
            except UsageError as error:
                return TrainingEnded(FAILED, f"the checkpoint {error}{hint}")
            logger.info(f"{path} is the best up to now: {self.metric} {score:.4f}")
            self.best = score
        return None
