"""MMEngine's strategies for both families: FSDP and DeepSpeed."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from mmengine._strategy import BaseStrategy, DeepSpeedStrategy, FSDPStrategy
from mmengine.device import get_device
from mmengine.dist import is_distributed, is_main_process
from mmengine.model import is_model_wrapper
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from elsa_core.blocks import Block
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing_by_name
from elsa_core.runtime.packages import need
from elsa_core.volo_classifier import ClassBlock

_BASE = "base_param_settings"  # for the learning rate in the log
_OF_EVERY_STRATEGY = ("work_dir", "experiment_name", "env_kwargs", "log_kwargs", "auto_scale_lr")
_DEEPSPEED_DEFAULTS = {"gradient_accumulation_steps": 1, "steps_per_print": 10**13}  # prints never


@FUNCTIONS.register_module()
def elsa_swin_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """FSDP's wrapping policy: it gathers the backbone's blocks one at a time."""
    return recurse or isinstance(module, (Block, ClassBlock))


@STRATEGIES.register_module()
class ELSAFSDPStrategy(FSDPStrategy):
    """Shards parameters, gradients and the optimizer's state over the processes.

    A checkpoint is one file with the whole state, as without FSDP, written completely or not at
    all. MMEngine's default is a folder of shards that only the same number of processes can load.
    Works on CPUs too. Takes `FSDPStrategy`'s arguments.
    """

    def __init__(
        self, *, model_wrapper: dict | None = None, state_dict_cfg: Any = "full", **kwargs: Any
    ) -> None:
        wrapper = dict(type="MMFullyShardedDataParallel", auto_wrap_policy="elsa_swin_blocks")
        wrapper.update(model_wrapper or {})
        super().__init__(model_wrapper=wrapper, state_dict_cfg=state_dict_cfg, **kwargs)
        if get_device() == "cpu":  # PyTorch would read memory that it has freed
            self.state_dict_config.offload_to_cpu = False
            self.optim_state_dict_config.offload_to_cpu = False

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if get_device() == "cpu" and not is_model_wrapper(model):
            # MMEngine would pass a GPU's index.
            self.model_wrapper["device_id"] = torch.device("cpu")
        return super()._wrap_model(model)

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> Any:
        wrapper = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(wrapper, "grad_name", None) == "grad_norm":
            wrapper.clip_func = self._clip_total_norm
        return wrapper

    def _clip_total_norm(self, params: list, max_norm: float, norm_type: float = 2.0) -> Any:
        """Clips the norm of the gradients of all processes; PyTorch's would be that of each."""
        return self.model.clip_grad_norm_(max_norm, norm_type)

    def optim_state_dict(self) -> dict:
        state = super().optim_state_dict()
        return {**state, _BASE: self.optim_wrapper.base_param_settings}

    def load_optim_state_dict(self, state_dict: dict) -> None:
        base = state_dict.pop(_BASE, None)
        # MMEngine passes the arguments in the order of PyTorch 2.0.
        optimizer = self.optim_wrapper.optimizer
        state = FSDP.optim_state_dict_to_load(self.model, optimizer, state_dict)
        self.optim_wrapper.load_state_dict({**state, _BASE: base})

    def save_checkpoint(self, filename: str, **kwargs: Any) -> None:
        if not self._is_full_state_dict():
            super().save_checkpoint(filename, **kwargs)
            return
        with replacing_by_name(filename) if is_main_process() else nullcontext(filename) as name:
            super().save_checkpoint(name, **kwargs)


@STRATEGIES.register_module()
class ELSADeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed with the optimizer, precision and accumulation of a config for other runs.

    DeepSpeed's settings take over from ``optim_wrapper``: ``torch_autocast`` from mixed precision,
    ``gradient_accumulation_steps`` from ``accumulative_counts`` and ``gradient_clipping`` from
    ``clip_grad.max_norm``. Works on CPUs too. Takes `DeepSpeedStrategy`'s arguments, and any other
    setting of DeepSpeed.
    """

    def __init__(
        self,
        *,
        config: str | dict | None = None,
        inputs_to_half: list[int | str] | None = None,
        exclude_frozen_parameters: bool | None = None,
        **settings: Any,
    ) -> None:
        need("deepspeed", type(self).__name__)
        # Not DeepSpeedStrategy's, which imports optimizers that newer versions of DeepSpeed lack.
        names = [name for name in _OF_EVERY_STRATEGY if name in settings]
        BaseStrategy.__init__(self, **{name: settings.pop(name) for name in names})
        given = {name: value for name, value in settings.items() if value is not None}
        self.config = {**_DEEPSPEED_DEFAULTS, **self._parse_config(config), **given}
        self._inputs_to_half = inputs_to_half
        self.exclude_frozen_parameters = exclude_frozen_parameters

    def prepare(self, model: Any, *, dispatch_kwargs: dict | None = None, **kwargs: Any) -> Any:
        size = (dispatch_kwargs or {}).get("train_micro_batch_size_per_gpu", 1)
        self.config.setdefault("train_micro_batch_size_per_gpu", size)
        return super().prepare(model, dispatch_kwargs=dispatch_kwargs, **kwargs)

    def _setup_distributed(self, launcher: str | None = None, **kwargs: Any) -> None:
        if not is_distributed():
            super()._setup_distributed(launcher, **kwargs)

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> Any:
        if isinstance(optim_wrapper, dict):
            optim_wrapper = self._without_what_deepspeed_does(copy.deepcopy(optim_wrapper))
        return super().build_optim_wrapper(optim_wrapper, model)

    def _without_what_deepspeed_does(self, wrapper: dict) -> dict:
        kind = wrapper.pop("type", "OptimWrapper")
        if kind in ("AmpOptimWrapper", "CPUAmpOptimWrapper"):
            default = "float16" if kind == "AmpOptimWrapper" else "bfloat16"
            dtype = wrapper.pop("dtype", None) or default
            self.config.setdefault("torch_autocast", {"enabled": True, "dtype": dtype})
            wrapper.pop("loss_scale", None)
        elif kind not in ("OptimWrapper", "DeepSpeedOptimWrapper"):
            raise UsageError(f"DeepSpeed needs optim_wrapper.type OptimWrapper, got {kind}")
        steps = wrapper.pop("accumulative_counts", 1)
        if steps > 1:
            self.config["gradient_accumulation_steps"] = steps
        if clipping := wrapper.pop("clip_grad", None):
            self.config["gradient_clipping"] = clipping["max_norm"]
        return {**wrapper, "type": "DeepSpeedOptimWrapper"}
