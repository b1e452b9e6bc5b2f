"""Training steps with mixed precision and gradient accumulation, on GPUs and on CPUs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elsa_core.param_groups import check_resumed
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.finite import FiniteWatch, not_finite
from elsa_core.runtime.preemption import max_over_ranks

logger = logging.getLogger(__name__)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class AutocastTrainer(SimpleTrainer):
    """Detectron2's AMPTrainer, which requires CUDA, for any type of device.

    Args:
        device_type: "cuda", "cpu", ...
        dtype: float16 (with loss scaling), bfloat16, or float32 for full precision.
        parts: number of equal parts of a batch that pass through the model before the optimizer
            steps. Losses are means over the parts, as over the processes of a distributed training.
        watch: counts iterations with non-finite losses or gradients, which are not logged and in
            which the optimizer does not step. `StopHook` ends the training.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        device_type: str,
        dtype: torch.dtype,
        parts: int = 1,
        watch: FiniteWatch | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.device_type = device_type
        self.dtype = dtype
        self.parts = parts
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=self.dtype == torch.float16)
        self.watch = watch or FiniteWatch()
        self.watch.guard(optimizer, self.grad_scaler)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        size = len(data) // self.parts
        self.optimizer.zero_grad()
        means: dict[str, Tensor] = {}
        for part in range(self.parts):
            for name, loss in self._backward(data[part * size : (part + 1) * size], part).items():
                means[name] = means.get(name, 0) + loss / self.parts
        self.after_backward()
        bad = not_finite(means)
        anywhere = bool(max_over_ranks(bool(bad)))
        if not anywhere:
            self._write_metrics(means, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if problem := self.watch.count(bad, anywhere):
            logger.warning(f"iteration {self.iter + 1}: {problem}")

    def _backward(self, data: list[Any], part: int) -> dict[str, Tensor]:
        """Adds the gradients of a part; the processes exchange them after the last one."""
        alone = isinstance(self.model, DistributedDataParallel) and part + 1 < self.parts
        with self.model.no_sync() if alone else nullcontext():
            enabled = self.dtype != torch.float32
            with torch.autocast(self.device_type, self.dtype if enabled else None, enabled=enabled):
                losses = self.model(data)
                loss = sum(losses.values()) / self.parts
            self.grad_scaler.scale(loss).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_resumed(state_dict["optimizer"]["param_groups"], self.optimizer.param_groups)
        super().load_state_dict(state_dict)
        # Empty or absent where the checkpoint comes from a CPU or from full precision.
        if scaler := state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(scaler)


def amp_dtype(name: str, device_type: str) -> torch.dtype:
    """Returns the dtype of SOLVER.AMP.DTYPE; "" is float16 on CUDA and bfloat16 elsewhere."""
    if not name:
        return torch.float16 if device_type == "cuda" else torch.bfloat16
    if name not in DTYPES:
        raise UsageError(f"SOLVER.AMP.DTYPE must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
