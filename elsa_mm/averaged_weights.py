"""Averages the weights of a training, and evaluates them beside the optimizer's."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import EMAHook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from mmengine.runner._flexible_runner import FlexibleRunner
from torch.optim import Optimizer

from elsa_core.ema import DECAY, METRICS, WARMUP, AveragedWeights
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.preemption import REFUSED, TrainingEnded
from elsa_core.weights.averages import BESIDE, trained


@HOOKS.register_module()
class AveragedWeightsHook(EMAHook):
    """EMAHook with the averages of `elsa_core.ema.AveragedWeights`.

    A validation evaluates the optimizer's weights and then the averaged ones, whose metrics have
    "ema/" before their names, where EMAHook evaluates only these. An average follows each step of
    the optimizer, not each iteration. Checkpoints are EMAHook's: ``state_dict`` has the averaged
    weights, ``ema_state_dict`` the optimizer's.

    Args:
        decay, warmup: as in `AveragedWeights`.
    """

    def __init__(self, decay: float = DECAY, warmup: float = WARMUP) -> None:
        super().__init__()
        self.decay, self.warmup = decay, warmup
        self.training = self.swapped = False

    def before_run(self, runner: Any) -> None:
        if hasattr(self, "ema_model") or not isinstance(runner._train_loop, BaseLoop):
            return
        _need_whole_parameters(runner)
        self.src_model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        try:
            self.ema_model = AveragedWeights(self.src_model, self.decay, self.warmup)
        except ValueError as error:
            raise UsageError(f"{type(self).__name__}: {error}") from error

    def before_train(self, runner: Any) -> None:
        optimizer = getattr(runner.optim_wrapper, "optimizer", None)
        if not isinstance(optimizer, Optimizer):
            name = type(runner.optim_wrapper).__name__
            end = f"{type(self).__name__} needs an OptimWrapper of one optimizer, got {name}"
            raise TrainingEnded(REFUSED, end)
        self.ema_model.follow(optimizer)
        self.ema_model.begin(self.src_model)
        self.training = True

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        self.ema_model.update(self.src_model)

    def after_train(self, runner: Any) -> None:
        self.training = False

    def before_val_epoch(self, runner: Any) -> None:
        """The model keeps its weights, which are evaluated first."""

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Evaluates the averaged weights and adds their metrics."""
        if not self.training or metrics is None:
            return
        runner.logger.info("Evaluation of the averaged weights")
        loop = runner.val_loop
        self._swap_ema_parameters()
        try:
            for index, batch in enumerate(loop.dataloader):
                loop.run_iter(index, batch)
            found = loop.evaluator.evaluate(len(loop.dataloader.dataset))
        finally:
            self._swap_ema_parameters()
        for name, value in found.items():
            metrics[METRICS + name] = value
            runner.message_hub.update_scalar(f"val/{METRICS}{name}", value)

    def before_test_epoch(self, runner: Any) -> None:
        if hasattr(self, "ema_model"):
            self.ema_model.begin(self.src_model)
            self._swap_ema_parameters()

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if hasattr(self, "ema_model"):
            self._swap_ema_parameters()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if self.swapped:  # the model has the averaged weights
            checkpoint[BESIDE] = self.ema_model.state_dict()
        else:
            super().before_save_checkpoint(runner, checkpoint)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if not runner._resume:
            if hasattr(self, "ema_model"):
                self.ema_model.n_averaged.zero_()  # the average begins with the loaded weights
            return
        _need_whole_parameters(runner)
        if BESIDE not in checkpoint:
            runner.logger.warning(
                f"{runner._load_from} has no averaged weights: the average begins with its weights"
            )
            return
        self.ema_model.load(checkpoint["state_dict"], checkpoint[BESIDE])
        checkpoint["state_dict"] = trained(checkpoint)

    def _swap_ema_parameters(self) -> None:
        """Exchanges parameters and buffers of the model with the averaged ones."""
        ours, theirs = self.ema_model.module.state_dict(), self.src_model.state_dict()
        for name, tensor in ours.items():
            kept = tensor.clone()
            tensor.copy_(theirs[name])
            theirs[name].copy_(kept)
        self.swapped = not self.swapped


def _need_whole_parameters(runner: Any) -> None:
    if isinstance(runner, FlexibleRunner):
        raise TrainingEnded(
            REFUSED,
            "AveragedWeightsHook needs runner_type Runner, got FlexibleRunner, which may divide "
            "the parameters among processes",
        )
