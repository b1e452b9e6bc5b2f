"""Checkpoints that survive kills and full disks, and trainings that stop when told to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner._flexible_runner import FlexibleRunner

from elsa_core.errors import UsageError
from elsa_core.stop import FAILED, Ended, StopSignals, largest, spare_workers, stopped

from .order import continue_order

STOPPED = "stopped.pth"


@HOOKS.register_module()
class StoppableCheckpointHook(CheckpointHook):
    """MMEngine's checkpoints, and one more when SIGTERM or SIGUSR1 ends the training.

    The signal, which one process may have received, ends all of them at the next iteration that
    the optimizer has stepped in, with `elsa_core.stop.Ended`; validations are broken off. The state
    goes into the regular checkpoint of that iteration, or where those are counted in epochs into
    ``stopped.pth``. A resumed training takes up the seed and the order of the data where it was
    left, in the middle of an epoch too.

    Every file appears complete or not at all, and where one cannot be written, the training ends
    in all processes. Takes `CheckpointHook`'s arguments; ``backend_args`` are those of
    `elsa_mm.AtomicLocalBackend` unless given.
    """

    def __init__(self, *args: Any, backend_args: dict | None = None, **kwargs: Any) -> None:
        backend_args = backend_args or dict(backend="atomic_local")
        super().__init__(*args, backend_args=backend_args, **kwargs)
        self.signals: StopSignals | None = None
        self.saved = 0  # iterations that the last checkpoint has

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        continue_order(runner)
        spare_workers(runner.train_dataloader)
        if runner.val_loop is not None:
            spare_workers(runner.val_dataloader)
        self.saved = runner.iter
        self.signals = StopSignals()
        self.signals.listen()

    def after_train_iter(self, runner: Any, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        super().after_train_iter(runner, batch_idx, *args, **kwargs)
        # The last iteration of an epoch belongs to an epoch that is done only after its end.
        if not _counts_epochs(runner) or batch_idx + 1 < len(runner.train_dataloader):
            self._stop_if_told(runner, runner.iter + 1, runner.epoch)

    def after_train_epoch(self, runner: Any) -> None:
        super().after_train_epoch(runner)
        if _counts_epochs(runner):
            self._stop_if_told(runner, runner.iter, runner.epoch + 1)

    def before_val(self, runner: Any) -> None:
        super().before_val(runner)
        self._stop_if_told(runner, runner.iter, runner.epoch)

    def after_val_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        super().after_val_iter(runner, *args, **kwargs)
        if self.signals is None:
            return
        sampler = getattr(runner.val_dataloader, "sampler", None)
        if get_world_size() > 1 and not getattr(sampler, "round_up", False):
            return  # the processes may have different numbers of batches
        # An averaged model has taken the place of the trained one.
        if any(isinstance(hook, EMAHook) for hook in runner.hooks) and self.saved < runner.iter:
            return
        self._stop_if_told(runner, runner.iter, runner.epoch)

    def after_val_epoch(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        super().after_val_epoch(runner, *args, **kwargs)
        self._stop_if_told(runner, runner.iter, runner.epoch)

    def after_train(self, runner: Any) -> None:
        if self.signals is not None:
            self.signals.close()
        super().after_train(runner)

    def _stop_if_told(self, runner: Any, done: int, epoch: int) -> None:
        """Args: done, epoch: iterations and epochs that are complete."""
        if self.signals is None or not _has_stepped(runner):
            return
        if not (number := self.signals.agreed()):
            return
        if done == runner.iter and isinstance(runner, FlexibleRunner):
            return  # which saves the number of the next iteration only
        if self.saved < done:
            meta = dict(epoch=epoch, iter=done)
            if not self.by_epoch:
                self._save_checkpoint_with_step(runner, done, meta)
            else:
                with self._as_stopped():
                    self._save_checkpoint_with_step(runner, done, meta)
        end = stopped(number, str(self.last_ckpt))
        runner.logger.warning(end.sentence)
        runner.visualizer.close()  # what it has not written yet
        raise end

    @contextmanager
    def _as_stopped(self) -> Iterator[None]:
        """Checkpoints have the name STOPPED, count no epoch, and no other is removed for them."""
        before = self.by_epoch, self.filename_tmpl, self.max_keep_ckpts
        self.by_epoch, self.filename_tmpl, self.max_keep_ckpts = False, STOPPED, -1
        try:
            yield
        finally:
            self.by_epoch, self.filename_tmpl, self.max_keep_ckpts = before

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        last = self.last_ckpt or runner.message_hub.runtime_info.get("last_ckpt")
        with _ending_together(runner, last):
            super()._save_checkpoint_with_step(runner, step, meta)
        self.saved = meta["iter"]

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        with _ending_together(runner, self.last_ckpt):
            super()._save_best_checkpoint(runner, metrics)


@contextmanager
def _ending_together(runner: Any, last: str | None) -> Iterator[None]:
    """Ends all processes where one, which writes for all of them, cannot."""
    failure = ""
    try:
        yield
    except UsageError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{error.filename or runner.work_dir} cannot be written: {error.strerror}"
    if largest(bool(failure)):
        hint = f"; --resume goes on from {last}" if last else ""
        end = Ended(FAILED, f"the checkpoint {failure or 'of the main process'}{hint}")
        runner.logger.error(end.sentence)
        raise end


def _counts_epochs(runner: Any) -> bool:
    return isinstance(runner.train_loop, EpochBasedTrainLoop)


def _has_stepped(runner: Any) -> bool:
    """Whether no gradients of earlier iterations wait for the optimizer's step."""
    wrapper = runner.optim_wrapper
    together = getattr(wrapper, "_accumulative_counts", 1)
    return together == 1 or wrapper._inner_count % together == 0
