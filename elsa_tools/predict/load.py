"""Loads a model: of either framework from a config and a checkpoint, or an exported one."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch

import elsa_core.weights
from elsa_core.runtime.errors import UsageError
from elsa_core.weights.averages import has_both, note

from .executors import load_executor
from .inferencer import Inferencer
from .runtime import RuntimeInferencer

logger = logging.getLogger(__name__)
YAML, PYTHON = (".yaml", ".yml"), (".py",)


def load_inferencer(
    config: str,
    weights: str | None,
    *,
    device: str | None = None,
    options: Sequence[str] = (),
) -> Inferencer:
    """The model of a config with the weights of a checkpoint of either framework.

    Args:
        config: a Detectron2 .yaml or an OpenMMLab .py file, or its place in our configs.
        weights: read without executing anything in it; None keeps the model's initialisation.
        device: None: CUDA where there is one, else the CPU.
        options: KEY VALUE pairs for Detectron2, KEY=VALUE for OpenMMLab.

    Raises:
        UsageError: files, options or a device that cannot be used, or do not match each other.
    """
    path = find_config(config)
    if weights is not None:
        if not os.path.isfile(weights):
            raise UsageError(f"the checkpoint {weights} does not exist")
        if has_both(elsa_core.weights.read_ahead(weights)):
            logger.warning(note(weights, averaged=True))
    place = _device(device)
    if path.endswith(YAML):
        from .d2 import Detectron2Inferencer

        return Detectron2Inferencer(path, weights, place, options)
    from .mm import OpenMMLabInferencer

    return OpenMMLabInferencer(path, weights, place, options)


def load_exported(
    path: str,
    *,
    device: str | None = None,
    threads: int | None = None,
    compiled: bool = False,
) -> RuntimeInferencer:
    """The model of a file that ``elsa export`` has written; needs neither framework.

    Args:
        path, device, threads, compiled: see `elsa_tools.predict.executors.load_executor`.

    Raises:
        UsageError: a file or a device that cannot be used, or a missing package.
    """
    return RuntimeInferencer(load_executor(path, device, threads, compiled))


def find_config(config: str) -> str:
    """The path of a config; names such as configs/mmdet/... also find the installed copy."""
    if not config.endswith(YAML + PYTHON):
        raise UsageError(f"the config must be a .yaml or a .py file, got {config}")
    if os.path.isfile(config):
        return config
    name = config.removeprefix("configs/")
    if name == config:
        raise UsageError(f"the config {config} does not exist")
    if config.endswith(YAML):
        from elsa_d2 import get_config_file

        return get_config_file(name.removeprefix("detectron2/"))
    from elsa_mm import get_config_file as get_openmmlab_config_file

    return get_openmmlab_config_file(name)


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise UsageError(f"--device {name} is not a device of PyTorch") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name} needs a CUDA device, PyTorch finds none")
    return name
