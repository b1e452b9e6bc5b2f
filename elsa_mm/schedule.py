"""The learning rate of the published ImageNet trainings."""

from __future__ import annotations

from math import cos, pi
from typing import Any

from mmengine.optim import _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """A linear warm-up, a cosine that counts from step 0, then a constant, as in timm 0.4.9.

    At step t the rate of a group whose highest rate is lr is ``warmup_lr`` + t / ``warmup`` * (lr -
    ``warmup_lr``) for t < ``warmup``, then ``eta_min`` + (lr - ``eta_min``) * (1 + cos(pi * t /
    ``T_max``)) / 2 for t < ``T_max``, then ``eta_min``. MMEngine's cosine starts at lr at the end
    of the warm-up.

    Args:
        optimizer: optimizer or optimizer wrapper.
        T_max: number of steps up to the end of the cosine, warm-up included.
        eta_min: the last rate.
        warmup: number of steps of the warm-up.
        warmup_lr: the rate at step 0.
        options: ``begin``, ``end``, ``by_epoch`` and others of MMEngine's schedulers; a step is an
            epoch unless ``by_epoch`` is False.

    Raises:
        ValueError: ``warmup`` is negative or longer than ``T_max``.
    """

    def __init__(
        self,
        optimizer: Any,
        T_max: int,
        eta_min: float = 0.0,
        warmup: int = 0,
        warmup_lr: float = 0.0,
        **options: Any,
    ) -> None:
        if not 0 <= warmup <= T_max:
            raise ValueError(f"warmup must be in 0..T_max, got {warmup=} and {T_max=}")
        self.T_max, self.eta_min = T_max, eta_min
        self.warmup, self.warmup_lr = warmup, warmup_lr
        super().__init__(optimizer, "lr", **options)

    def _get_value(self) -> list[float]:
        return [self._rate(highest, self.last_step) for highest in self.base_values]

    def _rate(self, highest: float, step: int) -> float:
        if step < self.warmup:
            return self.warmup_lr + step * (highest - self.warmup_lr) / self.warmup
        if step >= self.T_max:
            return self.eta_min
        return self.eta_min + (highest - self.eta_min) * (1 + cos(pi * step / self.T_max)) / 2
