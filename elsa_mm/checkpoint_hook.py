"""Checkpoints that survive kills and full disks, and a training that saves on preemption."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner._flexible_runner import FlexibleRunner
from torch.optim import Optimizer

from elsa_core.ema import METRICS
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing
from elsa_core.runtime.finite import MAX_NONFINITE, FiniteWatch, first_nonfinite, not_finite, spoilt
from elsa_core.runtime.lock import TrainingLock
from elsa_core.runtime.preemption import (
    FAILED,
    REFUSED,
    StopSignals,
    TrainingEnded,
    ended_by_signal,
    max_over_ranks,
    resume_hint,
    shield_workers,
)
from elsa_core.weights.averages import BESIDE, trained

from .averaged_weights import AveragedWeightsHook
from .resume_order import continue_order, seed_iteration

STOPPED = "stopped.pth"


@HOOKS.register_module()
class StoppableCheckpointHook(CheckpointHook):
    """CheckpointHook that also saves when SIGTERM or SIGUSR1 ends the training.

    A signal that any process receives ends all of them with
    `elsa_core.runtime.preemption.TrainingEnded`, at the next iteration in which the optimizer
    steps; a running validation is interrupted. The state is saved as the regular checkpoint of that
    iteration, or as ``stopped.pth`` where checkpoints count epochs. A resumed training continues
    the order of the data and its random numbers, in the middle of an epoch too.

    Each file is written completely or not at all. If one process cannot write it, the training
    ends in all processes. It also ends when losses or gradients stay non-finite
    (`elsa_core.runtime.finite`). A model with NaN is never saved.

    Takes `CheckpointHook`'s arguments; the default of ``backend_args`` is
    `elsa_mm.AtomicLocalBackend`.

    Args:
        max_nonfinite: the training ends after this many iterations in a row with a loss that is NaN
            or infinite, or this many steps in a row that are skipped because of such gradients.
    """

    def __init__(
        self,
        *args: Any,
        backend_args: dict | None = None,
        max_nonfinite: int = MAX_NONFINITE,
        **kwargs: Any,
    ) -> None:
        backend_args = backend_args or dict(backend="atomic_local")
        super().__init__(*args, backend_args=backend_args, **kwargs)
        self.watch = FiniteWatch(max_nonfinite)
        self.signals: StopSignals | None = None
        self.lock: TrainingLock | None = None
        self.saved = 0  # iterations in the last checkpoint
        self.good: str | None = None  # path of the last checkpoint
        self.progress: dict[str, int] | None = None  # of the training, while it is saved
        self.best = ""  # metric whose best checkpoint is being saved

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        self.lock = TrainingLock(runner.work_dir)  # tools/train.py holds it already
        try:
            self.lock.acquire()
        except UsageError as error:
            _fail(runner, TrainingEnded(REFUSED, str(error)))
        self._watch(runner)
        shield_workers(runner.train_dataloader)  # first: continue_order may start the workers
        continue_order(runner)
        if runner.val_loop is not None:
            shield_workers(runner.val_dataloader)
        self.saved = runner.iter
        self.signals = StopSignals()
        self.signals.listen()

    def before_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        super().before_train_iter(runner, *args, **kwargs)
        seed_iteration(runner)

    def _watch(self, runner: Any) -> None:
        source = getattr(runner, "_load_from", None)
        resumed = getattr(runner, "_resume", False)
        good = (resumed if isinstance(resumed, str) else source) if resumed else None
        self.good = os.path.abspath(good) if good and os.path.exists(good) else good
        name = _spoilt(runner)
        if max_over_ranks(bool(name)):
            raise TrainingEnded(
                REFUSED,
                f"{source or 'the model'} cannot be trained: "
                f"{name or 'a part of another process'} holds NaN or infinity",
            )
        wrapper = runner.optim_wrapper
        optimizer = getattr(wrapper, "optimizer", None)
        if isinstance(optimizer, Optimizer):  # DeepSpeed steps itself
            self.watch.guard(optimizer, getattr(wrapper, "loss_scaler", None))

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        self._count(runner, outputs or {})
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        # After its last iteration, an epoch counts as done in after_train_epoch.
        if not _counts_epochs(runner) or batch_idx + 1 < len(runner.train_dataloader):
            self._stop_if_told(runner, runner.iter + 1, runner.epoch)

    def _count(self, runner: Any, outputs: dict[str, Any]) -> None:
        """Counts non-finite losses, and ends the training after too many."""
        # As in BaseModel.parse_losses; other outputs are for the log.
        bad = not_finite({name: value for name, value in outputs.items() if "loss" in name})
        done, anywhere = runner.iter + 1, bool(max_over_ranks(bool(bad)))
        if problem := self.watch.count(bad, anywhere, _has_stepped(runner)):
            runner.logger.warning(f"iteration {done}: {problem}")
        if self.watch.at_limit or self.watch.bad and self.is_last_train_iter(runner):
            _fail(runner, self.watch.ended(done, self.good))
        if self.watch.recovered:
            name = _spoilt(runner)
            if max_over_ranks(bool(name)):
                _fail(runner, spoilt(name, done, self.good))

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
            return  # processes may have different numbers of batches
        # MMEngine's EMAHook has put the averaged weights into the model.
        swaps = any(
            isinstance(hook, EMAHook) and not isinstance(hook, AveragedWeightsHook)
            for hook in runner.hooks
        )
        if swaps and self.saved < runner.iter:
            return
        self._stop_if_told(runner, runner.iter, runner.epoch)

    def after_val_epoch(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        super().after_val_epoch(runner, *args, **kwargs)
        self._stop_if_told(runner, runner.iter, runner.epoch)

    def after_train(self, runner: Any) -> None:
        if runner.train_loop.stop_training and self.save_last and self.saved < runner.iter:
            # Ended early, by PatienceHook or EarlyStoppingHook.
            step = runner.epoch if self.by_epoch else runner.iter
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            self._save_checkpoint_with_step(runner, step, meta)
        self.stop_listening()
        super().after_train(runner)
        if self.lock is not None:
            self.lock.release()

    def stop_listening(self) -> None:
        """Restore the signal handlers. MMEngine does not call `after_train` if a training fails."""
        if self.signals is not None:
            self.signals.close()

    def _stop_if_told(self, runner: Any, done: int, epoch: int) -> None:
        """Saves and raises TrainingEnded if any process got a signal.

        Args:
            done, epoch: completed iterations and epochs.
        """
        # A non-finite state is not saved: the signal waits until it has recovered.
        if self.signals is None or self.watch.bad or not _has_stepped(runner):
            return
        if not (number := self.signals.any_rank_got()):
            return
        if done == runner.iter and isinstance(runner, FlexibleRunner):
            return  # FlexibleRunner can only save the number of the next iteration
        if self.saved < done:
            before = self.by_epoch, self.filename_tmpl, self.max_keep_ckpts
            if self.by_epoch:  # STOPPED counts no epoch and replaces no other checkpoint
                self.by_epoch, self.filename_tmpl, self.max_keep_ckpts = False, STOPPED, -1
            try:
                self._save_checkpoint_with_step(runner, done, dict(epoch=epoch, iter=done))
            finally:
                self.by_epoch, self.filename_tmpl, self.max_keep_ckpts = before
        end = ended_by_signal(number, str(self.last_ckpt))
        runner.logger.warning(end.sentence)
        runner.visualizer.close()  # writes what is pending
        raise end

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        """As in CheckpointHook, but old checkpoints are removed after the new one is written, and
        ``last_checkpoint`` is replaced atomically."""
        if self.watch.bad:
            runner.logger.warning("not saved, since losses or gradients are not finite")
            return
        name = self.filename_tmpl.format(step)
        path = self.file_backend.join_path(self.out_dir, name)
        old: list[int] = []
        if self.max_keep_ckpts > 0:
            kept = [one for one in self.keep_ckpt_ids if one != step] + [step]
            old, kept = kept[: -self.max_keep_ckpts], kept[-self.max_keep_ckpts :]
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info("keep_ckpt_ids", kept)
        before, self.progress = self.progress, self.progress or _progress(meta)
        best, self.best = self.best, ""
        with _ending_together(runner, path, self.good):
            self.last_ckpt = path
            runner.message_hub.update_info("last_ckpt", path)
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=dict(meta),
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                with replacing(os.path.join(runner.work_dir, "last_checkpoint")) as file:
                    file.write(path.encode())
                self._remove(old)
        self.good, self.saved = path, self.progress["iter"]
        self.progress, self.best = before, best

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Corrects the progress: MMEngine's FlexibleRunner adds one after a validation, too.

        Leaves the weights alone that had the best result, where there are averaged ones.
        """
        if self.progress is not None:
            checkpoint["meta"].update(self.progress)
        averages = any(isinstance(hook, AveragedWeightsHook) for hook in runner.hooks)
        if self.best and averages:
            if not self.best.startswith(METRICS):
                checkpoint["state_dict"] = trained(checkpoint)
            del checkpoint[BESIDE]

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # DeepSpeed's
                self.file_backend.rmtree(path)

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        if self.watch.bad or not self.save_best:
            return
        # Of "auto", the first metric: the averaged weights', if there are any.
        metrics = dict(sorted(metrics.items(), key=lambda item: not item[0].startswith(METRICS)))
        if "auto" in self.key_indicators:
            self._init_rule(self.rules, [next(iter(metrics))])
        finite = {name: value for name, value in metrics.items() if _is_finite(value)}
        self.progress = {"epoch": runner.epoch, "iter": runner.iter}
        with _ending_together(runner, "of the best result", self.good):
            for name in self.key_indicators:
                if name not in metrics:
                    end = f"save_best must be among {', '.join(metrics)}, got {name}"
                    _fail(runner, TrainingEnded(REFUSED, end + resume_hint(self.good)))
                self.best = name
                # MMEngine leaves out what is None.
                one = {**dict.fromkeys(metrics), name: finite.get(name)}
                super()._save_best_checkpoint(runner, one)
        self.progress, self.best = None, ""


@contextmanager
def _ending_together(runner: Any, path: str, last: str | None) -> Iterator[None]:
    """Ends all processes if the one that writes fails.

    Args:
        path: the file that is written.
        last: the previous checkpoint.
    """
    name = _spoilt(runner)
    failure = f"{path} is not written: {name} holds NaN or infinity" if name else ""
    # Agreed on before anything is removed or written.
    if not max_over_ranks(bool(failure)):
        try:
            yield
        except UsageError as error:
            failure = str(error)
        except OSError as error:
            failure = f"{error.filename or runner.work_dir} cannot be written: {error.strerror}"
        if not max_over_ranks(bool(failure)):
            return
    reason = f"the checkpoint {failure or 'of another process'}"
    _fail(runner, TrainingEnded(FAILED, reason + resume_hint(last)))


def _fail(runner: Any, end: TrainingEnded) -> NoReturn:
    runner.logger.error(end.sentence)
    runner.visualizer.close()  # writes what is pending
    raise end


def _spoilt(runner: Any) -> str:
    """Name of the first parameter or buffer, averaged ones included, with NaN or infinity."""
    averaged = [hook.ema_model for hook in runner.hooks if hasattr(hook, "ema_model")]
    return next(filter(None, map(first_nonfinite, [runner.model, *averaged])), "")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:  # None, or no number
        return False


def _progress(meta: dict) -> dict[str, int]:
    return {name: meta[name] for name in ("epoch", "iter")}


def _counts_epochs(runner: Any) -> bool:
    return isinstance(runner.train_loop, EpochBasedTrainLoop)


def _has_stepped(runner: Any) -> bool:
    """Whether no accumulated gradients wait for the optimizer's step."""
    wrapper = runner.optim_wrapper
    together = getattr(wrapper, "_accumulative_counts", 1)
    return together == 1 or wrapper._inner_count % together == 0
