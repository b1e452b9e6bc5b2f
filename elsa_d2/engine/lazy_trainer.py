"""The trainer of detectors that a LazyConfig describes."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.engine import hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNN
from detectron2.solver import LRMultiplier
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from elsa_core.param_groups import check_max_norm
from elsa_core.runtime.errors import UsageError, one_line
from elsa_d2.lazy import keys_of, load_lazy_config
from elsa_d2.solver.optimizer import clip_total_norm

from .trainer import Trainer, shielded

logger = logging.getLogger(__name__)


class LazyTrainer(Trainer):
    """`Trainer` whose model, optimizer, schedule, data and evaluator are those of a LazyConfig.

    `lazy_run` makes the subclass for a config, and reads what it says about the run into the keys
    of `Trainer`.

    Attributes:
        lazy: the config.
    """

    lazy: DictConfig

    @classmethod
    def describe(cls, cfg: CfgNode) -> DictConfig:
        config = copy.deepcopy(cls.lazy)
        config.train.device = cfg.MODEL.DEVICE
        return config

    @classmethod
    def check_parts(cls, cfg: CfgNode, eval_only: bool) -> nn.Module:
        """As `Trainer.check_parts`, by instantiating the parts; of the evaluator, which reads the
        data set, the arguments."""
        with torch.device("meta"):
            model = _made("model", lambda: instantiate(cls.lazy.model))
        if not isinstance(model, GeneralizedRCNN):
            raise UsageError(f"model must be a GeneralizedRCNN, got {type(model).__name__}")
        if len(cfg.DATASETS.TEST) != 1:
            raise UsageError(
                "dataloader.test.dataset.names must be one data set, "
                f"got {', '.join(cfg.DATASETS.TEST) or 'none'}"
            )
        loaders = cls.lazy.dataloader
        if not isinstance(loaders.get("evaluator"), DictConfig):
            raise UsageError("dataloader.evaluator must be one evaluator, got none or several")
        _made("dataloader.evaluator", lambda: _check_call(loaders.evaluator))
        _made("dataloader.test.mapper", lambda: instantiate(loaders.test.mapper))
        if not eval_only:
            _made("dataloader.train.mapper", lambda: instantiate(loaders.train.mapper))
            layer = nn.Linear(1, 1)
            optimizer = _made("optimizer", lambda: cls.build_optimizer(cfg, layer))
            _made("lr_multiplier", lambda: cls.build_lr_scheduler(cfg, optimizer))
        return model

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = instantiate(cls.lazy.model).to(cfg.MODEL.DEVICE)
        logger.info(f"Model:\n{model}")
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        config = copy.deepcopy(cls.lazy.optimizer)
        config.params.model = model
        optimizer, clip = instantiate(config), cfg.SOLVER.CLIP_GRADIENTS
        if clip.ENABLED:
            check_max_norm("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", clip.CLIP_VALUE)
            clip_total_norm(optimizer, clip.CLIP_VALUE)
        return optimizer

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        return LRMultiplier(optimizer, instantiate(cls.lazy.lr_multiplier), cfg.SOLVER.MAX_ITER)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        return shielded(instantiate(cls.lazy.dataloader.train))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        return shielded(instantiate(cls.lazy.dataloader.test))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, folder: str = "inference"
    ) -> DatasetEvaluator:
        """An evaluator that names an ``output_dir`` writes to this folder in train.output_dir."""
        evaluator = copy.deepcopy(cls.lazy.dataloader.evaluator)
        if "output_dir" in evaluator:
            evaluator.output_dir = os.path.join(cfg.OUTPUT_DIR, folder)
        return instantiate(evaluator)

    def build_hooks(self) -> list[hooks.HookBase]:
        built = super().build_hooks()
        for hook in built:
            if isinstance(hook, hooks.PeriodicWriter):
                hook._period = self.lazy.train.get("log_period", hook._period)
            elif isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = self.lazy.train.checkpointer.get("max_to_keep")
        return built


@lru_cache(maxsize=1)  # a config registers its data sets, which can be done once
def _run(config_file: str, overrides: tuple[str, ...]) -> tuple[CfgNode, type[LazyTrainer]]:
    config = load_lazy_config(config_file, overrides)
    ddp = config.train.get("ddp") or DictConfig(dict(LazyTrainer.ddp))
    parts = {"lazy": config, "ddp": OmegaConf.to_container(ddp)}
    return keys_of(config), type(LazyTrainer.__name__, (LazyTrainer,), parts)


def lazy_run(config_file: str, overrides: list[str]) -> tuple[CfgNode, type[Trainer]]:
    """Returns the keys of a run that a LazyConfig describes, and its trainer.

    Raises UsageError as `load_lazy_config` and `keys_of`.
    """
    cfg, trainer = _run(config_file, tuple(overrides))
    return cfg.clone(), trainer


def _check_call(node: DictConfig) -> None:
    """Raises TypeError unless a LazyCall has the arguments that what it calls takes."""
    target = locate(node._target_) if isinstance(node._target_, str) else node._target_
    inspect.signature(target).bind(**{str(key): None for key in node if key != "_target_"})


def _made(name: str, make: Any) -> Any:
    try:
        return make()
    except UsageError:
        raise
    except Exception as error:  # of whatever class or function the config names
        raise UsageError(f"{name} cannot be built: {one_line(error)}") from error
