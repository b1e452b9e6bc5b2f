"""Mixed precision on CPUs, which MMEngine's AmpOptimWrapper refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PARTS = ("backbone", "neck")


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Trains with the model's `backbone` and `neck` in bfloat16.

    The heads stay in float32, because mmcv's operators do not support bfloat16 on CPUs. bfloat16
    has float32's range and needs no loss scaling. Takes `OptimWrapper`'s arguments.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        module = model.module if is_model_wrapper(model) else model
        with ExitStack() as stack:
            for part in (getattr(module, name, None) for name in PARTS):
                if isinstance(part, nn.Module):
                    for hook in _compute_in_bfloat16(part):
                        stack.callback(hook.remove)
            stack.enter_context(super().optim_context(model))
            yield


def _compute_in_bfloat16(part: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    """Registers hooks with which the module computes in bfloat16 and returns float32."""
    autocast = torch.autocast("cpu", torch.bfloat16)

    def enter(*_: Any) -> None:
        autocast.__enter__()

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        autocast.__exit__(None, None, None)
        return apply_to(output, _is_bfloat16, Tensor.float)

    return (
        part.register_forward_pre_hook(enter),
        part.register_forward_hook(leave, always_call=True),
    )


def _is_bfloat16(value: Any) -> bool:
    return torch.is_tensor(value) and value.dtype == torch.bfloat16
