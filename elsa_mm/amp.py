"""Mixed precision on CPUs, where MMEngine's own wrapper refuses to work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.utils import apply_to
from torch import Tensor, nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Trains with the model's `extract_feat`, that is backbone and neck, in bfloat16.

    The heads stay in float32, because mmcv's operators know no bfloat16 on CPUs. bfloat16 has
    float32's range, so that no loss scaling is needed. Takes `OptimWrapper`'s arguments.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        module = model.module if is_model_wrapper(model) else model
        extract_feat = module.extract_feat

        def extract_in_bfloat16(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                features = extract_feat(*args, **kwargs)
            return apply_to(features, torch.is_tensor, Tensor.float)

        module.extract_feat = extract_in_bfloat16
        try:
            with super().optim_context(model):
                yield
        finally:
            del module.extract_feat  # the method is there again
