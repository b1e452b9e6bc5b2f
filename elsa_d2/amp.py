"""Training steps in mixed precision, on a GPU or on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from elsa_core.errors import UsageError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class AutocastTrainer(SimpleTrainer):
    """Like Detectron2's AMPTrainer, which insists on CUDA, for any type of device.

    Args:
        device_type: "cuda", "cpu", ...
        dtype: float16, whose loss is scaled, or bfloat16, which needs no scaling.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        device_type: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.device_type = device_type
        self.dtype = dtype
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=self.dtype == torch.float16)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast(self.device_type, self.dtype):
            losses = self.model(data)
            loss = sum(losses.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(loss).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # Empty or absent where the checkpoint comes from a CPU or from full precision.
        if scaler := state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(scaler)


def amp_dtype(name: str, device_type: str) -> torch.dtype:
    """What SOLVER.AMP.DTYPE names; "" is float16 on CUDA and bfloat16 elsewhere."""
    if not name:
        return torch.float16 if device_type == "cuda" else torch.bfloat16
    if name not in DTYPES:
        raise UsageError(f"SOLVER.AMP.DTYPE must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
