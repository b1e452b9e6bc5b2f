"""Ends a training whose evaluations get no better."""

from __future__ import annotations

from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.patience import Patience
from elsa_core.runtime.preemption import FAILED, REFUSED, TrainingEnded, max_over_ranks


@HOOKS.register_module()
class PatienceHook(Hook):
    """EarlyStoppingHook by the rule of `elsa_core.runtime.patience.Patience`.

    NaN is a validation without improvement, where EarlyStoppingHook ends the training. A resumed
    training continues to count. `StoppableCheckpointHook` saves the last checkpoint.

    Args:
        monitor: a metric of the validation; higher is better.
        patience, min_delta: as in `Patience`.
    """

    priority = "LOWEST"

    def __init__(self, monitor: str, patience: int = 5, min_delta: float = 0.0) -> None:
        self.rule = Patience("", monitor, patience, min_delta)

    def before_train(self, runner: Any) -> None:
        rule = self.rule
        self.rule = Patience(runner.work_dir, rule.metric, rule.patience, rule.min_delta)
        if is_main_process():
            self.rule.resume(runner.iter)
        self._end_if_due(runner, "")

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if not metrics or not getattr(runner._train_loop, "iter", 0):
            return
        if self.rule.metric not in metrics:
            end = f"monitor must be among {', '.join(metrics)}, got {self.rule.metric}"
            raise TrainingEnded(REFUSED, end)
        failure = ""
        if is_main_process():
            try:
                self.rule.add(runner.iter, metrics[self.rule.metric])
            except UsageError as error:
                failure = str(error)
        self._end_if_due(runner, failure)

    def _end_if_due(self, runner: Any, failure: str) -> None:
        bad = any(getattr(hook, "watch", None) and hook.watch.bad for hook in runner.hooks)
        verdict = "" if bad else self.rule.verdict()
        # One reduction for both.
        state = max_over_ranks(2 if failure else int(bool(verdict)))
        if state == 2:
            raise TrainingEnded(FAILED, failure or "the main process cannot write")
        if state:
            runner.train_loop.stop_training = True
            runner.logger.info(verdict)
