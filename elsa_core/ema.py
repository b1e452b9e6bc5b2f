"""Averages a model's weights over the steps of a training, by one rule in both frameworks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from elsa_core.weights.averages import beside

DECAY, WARMUP = 0.999, 10
# Of the names of the averaged weights' metrics, such as "ema/bbox/AP".
METRICS = "ema/"


class AveragedWeights(AveragedModel):
    """A copy of a model whose parameters are moving averages of the model's parameters.

    The first step of the optimizer copies the parameters. Each later one, number k + 1, makes the
    average d * average + (1 - d) * parameter, where d = min(``decay``, k / (k + ``warmup``)): at
    first, the average spans about the last 1 / ``warmup`` of the steps, in the end 1 / (1 -
    ``decay``) of them, and never the initial parameters. Buffers are copied. A step that is
    skipped, because a gradient is not finite, changes nothing.

    Args:
        model: the model, not wrapped for several processes.
        decay: in [0, 1).
        warmup: at least 0; 0: d is ``decay`` from the second step on.

    Raises:
        ValueError: ``decay`` or ``warmup`` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float = DECAY, warmup: float = WARMUP) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay of the averaged weights must be in [0, 1), got {decay}")
        if not warmup >= 0:
            raise ValueError(f"warm-up of the averaged weights must be 0 or more, got {warmup}")
        super().__init__(model, multi_avg_fn=self._average)
        self.module.requires_grad_(False).eval()
        self.decay, self.warmup = decay, warmup
        self.stepped = False

    def follow(self, optimizer: Optimizer) -> None:
        """Note the steps of the optimizer, for `update`."""
        optimizer.register_step_post_hook(self._note_step)

    def begin(self, model: nn.Module) -> None:
        """Copy the model's state unless a step has been averaged."""
        if not self.n_averaged:
            self.module.load_state_dict(model.state_dict())

    def update(self, model: nn.Module) -> None:
        """Average the model's parameters if the optimizer has stepped since the last call."""
        if self.stepped:
            self.update_parameters(model)
        self.stepped = False

    def weights_and_rest(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the averaged weights for a checkpoint, and what to save beside them."""
        rest = beside(model.state_dict(), n_averaged=self.n_averaged)
        return self.module.state_dict(), rest

    def load(self, weights: dict[str, Tensor], rest: dict[str, Tensor]) -> None:
        """Restore what `weights_and_rest` returned, or a checkpoint of MMEngine's EMAHook."""
        self.module.load_state_dict(weights)
        self.n_averaged.copy_(rest["n_averaged" if "n_averaged" in rest else "steps"])

    @torch.compiler.disable
    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Where a gradient is not finite, elsa_core.runtime.finite has removed all of them.
        groups = optimizer.param_groups
        self.stepped |= any(p.grad is not None for group in groups for p in group["params"])

    def _average(self, averages: Any, parameters: Any, _: Any) -> None:
        k = int(self.n_averaged)  # on the CPU
        decay = min(self.decay, k / (k + self.warmup))
        get_ema_multi_avg_fn(decay)(averages, parameters, k)
