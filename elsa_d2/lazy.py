"""LazyConfigs, Detectron2's configs in Python: reads them, and the keys of `Trainer` from them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import getitem
from typing import Any

from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from elsa_core.runtime.errors import UsageError, one_line

from .config import load_config

# A key of `Trainer`, and where a LazyConfig has it. Keys that a LazyConfig lacks have the defaults
# of `load_config`.
KEYS = {
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.EMA.ENABLED": "train.ema.enabled",
    "MODEL.EMA.DECAY": "train.ema.decay",
    "MODEL.EMA.WARMUP": "train.ema.warmup",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "DATASETS.REGISTER_COCO": "dataloader.register_coco",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATALOADER.MIN_IMAGE_SIZE": "dataloader.train.dataset.min_image_size",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.ACCUMULATE_STEPS": "train.accumulate_steps",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "train.clip_grad.enabled",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "train.clip_grad.max_norm",
    "SOLVER.MAX_NONFINITE": "train.max_nonfinite",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.AMP.DTYPE": "train.amp.dtype",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "TEST.BEST_METRIC": "train.best_metric",
    "TEST.PATIENCE": "train.patience",
    "TEST.MIN_DELTA": "train.min_delta",
    "LOG.WRITERS": "train.writers",
    "LOG.PROJECT": "train.project",
}
# What else a trainer takes from `train`.
OTHERS = (
    "train.ddp",
    "train.log_period",
    "train.checkpointer.max_to_keep",
    "train.cudnn_benchmark",
)
PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
_WORDS = {**KEYS, "MODEL.EMA": "train.ema"}
_KEY = re.compile("|".join(re.escape(key) for key in sorted(_WORDS, key=len, reverse=True)))


def load_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Runs a LazyConfig, which is a program, and changes what overrides of the form KEY=VALUE name.

    Raises UsageError for a file or an override that is not valid, for a config without one of
    `PARTS`, and for keys of ``train`` that nothing reads.
    """
    if not os.path.isfile(config_file):
        raise UsageError(f"config file {config_file or '(none)'} does not exist")
    try:
        config = LazyConfig.load(config_file)
    except UsageError:
        raise
    except Exception as error:  # a program, which can fail in any way
        raise UsageError(f"config file {config_file} is not valid: {one_line(error)}") from error
    for override in overrides:
        name = override.partition("=")[0].split(".")[0].lstrip("+~")
        if "=" not in override or name not in config:
            raise UsageError(
                f"overrides must be KEY=VALUE with a key of {', '.join(map(str, config))}, "
                f"got {override}"
            )
        try:
            LazyConfig.apply_overrides(config, [override])
        except Exception as error:
            raise UsageError(f"{override} is not valid: {one_line(error)}") from error
    if missing := [name for name in PARTS if name not in config]:
        raise UsageError(f"config file {config_file} has no {', '.join(missing)}")
    known = {*KEYS.values(), *OTHERS}
    for key in _leaves(config.train, "train"):
        if not any(key == name or key.startswith(f"{name}.") for name in known):
            raise UsageError(f"config file {config_file}: nothing reads {key}")
    return config


def keys_of(config: DictConfig) -> CfgNode:
    """Returns the config of a `Trainer` with what a LazyConfig says about the run.

    Raises UsageError for a value of another type than the key of `KEYS` has.
    """
    cfg = load_config()
    heads = OmegaConf.select(config, "model.roi_heads") or {}
    cfg.MODEL.MASK_ON = heads.get("mask_head") is not None
    cfg.MODEL.KEYPOINT_ON = heads.get("keypoint_head") is not None
    for key, name in KEYS.items():
        try:
            value = OmegaConf.select(config, name)
            if value is None:
                continue
            if isinstance(value, ListConfig):
                value = OmegaConf.to_container(value)
            if key in ("DATASETS.TRAIN", "DATASETS.TEST") and isinstance(value, str):
                value = [value]
            if type(value) is int and isinstance(reduce(getitem, key.split("."), cfg), float):
                value = float(value)
            cfg.merge_from_other_cfg(_nested(key, value))
        except Exception as error:
            raise UsageError(f"{name} is not valid: {one_line(error)}") from error
    return cfg


def in_words_of_lazy_config(sentence: str) -> str:
    """Returns a sentence about keys of `Trainer` with the names that a LazyConfig has for them."""
    return _KEY.sub(lambda found: _WORDS[found[0]], sentence)


def _nested(key: str, value: Any) -> CfgNode:
    for name in reversed(key.split(".")):
        value = CfgNode({name: value})
    return value


def _leaves(node: DictConfig, prefix: str) -> Iterator[str]:
    """Names of all values under a node."""
    for name, value in node.items():
        key = f"{prefix}.{name!s}"
        if isinstance(value, DictConfig):
            yield from _leaves(value, key)
        else:
            yield key
