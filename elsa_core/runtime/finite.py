"""Keeps NaN and infinity out of a training's parameters, and ends a training that does not recover.

The rule, for every framework and precision:

- An iteration is bad where any of its losses, in any process, is NaN or infinite.
- A step of the optimizer with a gradient that is NaN or infinite is left out: parameters, momenta
  and the optimizer's count of steps stay as they are. GradScaler does that in float16,
  `FiniteWatch.guard` in every other precision.
- Bad iterations in a row, or steps in a row that were left out, end the training when there are
  `MAX_NONFINITE` of them. A step that GradScaler leaves out does not count while that lowers a
  scale of 1 or more, as it does in the beginning of a training.
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
    """Counts bad iterations and steps of a training, the same in all of its processes.

    Args:
        limit: so many in a row end the training.

    Attributes:
        losses, steps: bad iterations, and steps left out, in a row up to now.
        recovered: whether the last iteration was the first good one after bad ones, which may have
            left NaN in the statistics of batch norm.
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
        """Whether the last iteration had a loss that is not finite, or its step was left out."""
        return self.losses + self.steps > 0

    @property
    def at_limit(self) -> bool:
        return max(self.losses, self.steps) >= self.limit

    def guard(self, optimizer: Optimizer, scaler: Any = None) -> None:
        """From now on, the optimizer leaves out steps whose gradients are not finite.

        Args:
            scaler: a GradScaler that steps it, None without one.
        """
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._scale = self._scaler.get_scale() if self._scaler else 0.0
        optimizer.register_step_pre_hook(self._before_step)

    @torch.compiler.disable
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepped = True
        if self._scaler:  # it has looked at the gradients
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        # With FSDP, each process has a part of them.
        if max_over_ranks(not all_finite(gradients)):
            self._stepped = False
            for parameter in parameters:
                parameter.grad = None  # which optimizers pass over

    def count(self, bad: Mapping[str, float], anywhere: bool, step_due: bool = True) -> str:
        """Takes note of an iteration; returns what to warn of, "" if there is nothing.

        Args:
            bad: this process's losses that are not finite, by name.
            anywhere: whether any process has some.
            step_due: the optimizer was to step, as it is not while gradients are accumulated.
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
        """None where that is not known, and where GradScaler finds a scale that suits."""
        taken, self._stepped = self._stepped, None
        if self._scaler:
            before, self._scale = self._scale, self._scaler.get_scale()
            if not taken:
                return None if 1 <= self._scale < before else False
        return taken

    def ended(self, done: int, checkpoint: str | None) -> TrainingEnded:
        """The end of the training.

        Args:
            done: iterations up to now.
            checkpoint: the last one of this training.
        """
        if self.losses >= self.steps:
            times, what = _times(self.losses, "iteration"), "losses"
        else:
            times, what = _times(self.steps, "step"), "gradients"
        reason = f"after {times} with {what} that are not finite ({self._what})"
        return _ended(done, reason, checkpoint)


def spoilt(name: str, done: int, checkpoint: str | None) -> TrainingEnded:
    """The end of a training that has NaN or infinity in ``name``, "" in another process."""
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
    """Those of the tensors that are NaN or infinite, by name."""
    tensors = {name: value for name, value in losses.items() if isinstance(value, Tensor)}
    if all_finite(tensors.values()):
        return {}
    means = {name: value.detach().float().mean().item() for name, value in tensors.items()}
    return {name: mean for name, mean in means.items() if not math.isfinite(mean)}


def first_nonfinite(model: nn.Module) -> str:
    """The name of something that a training changes and that has NaN or infinity, "" without.

    That is a parameter or, of the buffers, the statistics of batch norm.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= {name: b for name, b in model.named_buffers() if _STATISTICS.fullmatch(name)}
    if all_finite(tensors.values()):
        return ""
    return next(name for name, tensor in tensors.items() if not all_finite([tensor]))
