"""Keep NaN and infinity out of the parameters, and end a training that does not recover.

The rules are the same for every framework and precision:

- An iteration is bad if any loss, in any process, is NaN or infinite.
- The optimizer skips a step if a gradient is NaN or infinite: parameters, momenta and its step
  count do not change. GradScaler skips it in float16, `FiniteWatch.guard` in other precisions.
- `MAX_NONFINITE` bad iterations or skipped steps in a row end the training. A step that GradScaler
  skips does not count while it lowers a scale that stays at 1 or more, as at the beginning of a
  training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import UsageError
from .nonfinite import all_finite
from .preemption import FAILED, TrainingEnded, max_over_ranks

MAX_NONFINITE = 10
_STATISTICS = re.compile(r"(.*\.)?running_(mean|var)")


class FiniteWatch:
    """Counts bad iterations and skipped steps; the counts agree in all processes.

    Args:
        limit: number in a row that ends the training.
        name: setting that the limit comes from, for error messages.

    Attributes:
        losses, steps: current number of bad iterations, and of skipped steps, in a row.
        recovered: whether the last iteration was the first good one after bad ones, which may have
            left NaN in the batch norm statistics.
    """

    def __init__(self, limit: int = MAX_NONFINITE, name: str = "max_nonfinite") -> None:
        if not isinstance(limit, int) or limit < 1:
            raise UsageError(f"{name} must be an integer of at least 1, got {limit!r}")
        self.limit = limit
        self.losses = self.steps = 0
        self.recovered = False
        self._what = ""
        self._scaler: Any = None
        self._scale = 0.0
        self._stepped: bool | None = None  # None: the optimizer was not asked to step

    @property
    def bad(self) -> bool:
        """Whether the last iteration had a non-finite loss or its step was skipped."""
        return self.losses + self.steps > 0

    @property
    def at_limit(self) -> bool:
        return max(self.losses, self.steps) >= self.limit

    def guard(self, optimizer: Optimizer, scaler: Any = None) -> None:
        """Make the optimizer skip steps whose gradients are not finite.

        Args:
            scaler: GradScaler that steps the optimizer, or None.
        """
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._scale = self._scaler.get_scale() if self._scaler else 0.0
        optimizer.register_step_pre_hook(self._before_step)

    @torch.compiler.disable
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepped = True
        if self._scaler:  # which has checked the gradients
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        # With FSDP, each process has a shard of the gradients.
        if max_over_ranks(not all_finite(gradients)):
            self._stepped = False
            for parameter in parameters:
                parameter.grad = None  # optimizers skip it

    def count(self, bad: Mapping[str, float], anywhere: bool, step_due: bool = True) -> str:
        """Count an iteration. Return a warning, or "" if the iteration was good.

        Args:
            bad: non-finite losses of this process, by name.
            anywhere: whether any process has a non-finite loss.
            step_due: whether the optimizer should have stepped; False while gradients accumulate.
        """
        before = self.bad
        self.losses = self.losses + 1 if anywhere else 0
        taken = self._step_taken() if step_due else None
        if taken is not None:
            self.steps = 0 if taken else self.steps + 1
        self.recovered = before and not self.bad
        if anywhere:
            self._what = _named(bad) or "a loss of another process is not finite"
        elif taken is False:
            self._what = "a gradient is not finite"
        else:
            return ""
        number = self.losses if anywhere else self.steps
        return f"{self._what} ({number} in a row, {self.limit} end the training)"

    def _step_taken(self) -> bool | None:
        """Whether the optimizer stepped; None if unknown or while GradScaler adjusts its scale."""
        taken, self._stepped = self._stepped, None
        if self._scaler:
            before, self._scale = self._scale, self._scaler.get_scale()
            if not taken:
                return None if 1 <= self._scale < before else False
        return taken

    def ended(self, done: int, checkpoint: str | None) -> TrainingEnded:
        """Return the exception that ends the training.

        Args:
            done: number of completed iterations.
            checkpoint: last checkpoint of this training.
        """
        if self.losses >= self.steps:
            times, what = _times(self.losses, "iteration"), "losses"
        else:
            times, what = _times(self.steps, "step"), "gradients"
        reason = f"after {times} with {what} that are not finite ({self._what})"
        return _ended(done, reason, checkpoint)


def spoilt(name: str, done: int, checkpoint: str | None) -> TrainingEnded:
    """Return the exception that ends a training with NaN or infinity in the tensor ``name``, ""
    if only another process has it."""
    return _ended(
        done, f"because {name or 'a buffer of another process'} is not finite", checkpoint
    )


def _ended(done: int, reason: str, checkpoint: str | None) -> TrainingEnded:
    good = f"the last finite checkpoint is {checkpoint}" if checkpoint else "no checkpoint is good"
    return TrainingEnded(FAILED, f"training ended at iteration {done} {reason}; {good}")


def _times(number: int, unit: str) -> str:
    return f"{number} {unit}s in a row" if number > 1 else f"one {unit}"


def _named(bad: Mapping[str, float]) -> str:
    name, value = next(iter(bad.items()), ("", 0.0))
    others = f", {len(bad) - 1} other losses are not finite either" if len(bad) > 1 else ""
    return name and f"{name} is {value}{others}"


def not_finite(losses: Mapping[str, Any]) -> dict[str, float]:
    """Return the means of the losses that are NaN or infinite, by name."""
    tensors = {name: value for name, value in losses.items() if isinstance(value, Tensor)}
    if all_finite(tensors.values()):
        return {}
    means = {name: value.detach().float().mean().item() for name, value in tensors.items()}
    return {name: mean for name, mean in means.items() if not math.isfinite(mean)}


def first_nonfinite(model: nn.Module) -> str:
    """Return the name of a parameter or batch norm statistic that is not finite, or ""."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= {name: b for name, b in model.named_buffers() if _STATISTICS.fullmatch(name)}
    if all_finite(tensors.values()):
        return ""
    return next(name for name, tensor in tensors.items() if not all_finite([tensor]))
