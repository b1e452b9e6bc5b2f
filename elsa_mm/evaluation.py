"""Validation during training with test-time augmentation."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import LOOPS, MODELS
from mmengine.runner import ValLoop, autocast
from torch import nn
from torch.utils.data import DataLoader


@LOOPS.register_module()
class AugmentedValLoop(ValLoop):
    """ValLoop for a pipeline with `TestTimeAug`: merges the predictions over the views.

    Args:
        runner, dataloader, evaluator, fp16: as in ValLoop.
        tta_model: config of the merging `BaseTTAModel` without its module, such as the toolbox's
            `tta_model` for tests.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: DataLoader | dict,
        evaluator: Evaluator | dict | list,
        tta_model: dict,
        fp16: bool = False,
    ) -> None:
        super().__init__(runner, dataloader, evaluator, fp16)
        self.tta_model = tta_model

    @cached_property
    def model(self) -> Any:
        """The merging model, built late: some runners build their model after their loops."""
        return MODELS.build({**self.tta_model, "module": _AsModule(self.runner.model)})

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: dict) -> None:
        """Evaluates one batch, whose values are lists with an entry for each view."""
        self.runner.call_hook("before_val_iter", batch_idx=idx, data_batch=data_batch)
        with autocast(enabled=self.fp16):
            outputs = self.model.test_step(data_batch)
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook(
            "after_val_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs
        )


class _AsModule(nn.Module):
    """A wrapped model as a module for BaseTTAModel; DeepSpeed's wrapper is none."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.__dict__["model"] = model

    def test_step(self, data: Any) -> Any:
        return self.model.test_step(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self.model, "module", self.model), name)
