"""From a config and a checkpoint to something that predicts, in either framework."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import elsa_weights
from elsa_core.errors import UsageError
from elsa_data.classes import difference

from .results import Result, Segmentation, palette

# Bytes that a result takes until it is drawn, at most, and those of each pixel: a hundred masks in
# all their copies, or the logits of a class, twice; pixels that a picture has.
MEMORY, OF_MASKS, OF_CLASS, MOST_PAINTED = 4 * 10**9, 500, 8, 25_000_000
YAML, PYTHON = (".yaml", ".yml"), (".py",)


class Predictor(ABC):
    """A model with its test pipeline.

    Attributes:
        framework: "detectron2", "mmdet" or "mmseg".
        task: "detection" or "segmentation".
        model: the framework's own, in evaluation mode.
        classes: a name for each class; numbers where none are known, which ``note`` tells.
        colours: an RGB colour for each class.
    """

    framework: str
    task: str
    model: nn.Module
    classes: list[str]
    colours: list[tuple[int, int, int]]
    note: str | None = None

    @property
    def most_pixels(self) -> int:
        """Of an image whose results fit into some gigabytes of memory until they are drawn."""
        of_pixel = OF_CLASS * len(self.classes) if self.task == "segmentation" else OF_MASKS
        return min(MOST_PAINTED, MEMORY // of_pixel)

    @abstractmethod
    def predict(self, image: np.ndarray) -> Result:
        """Everything found in an image [H, W, 3], 8 bits, blue first."""

    @abstractmethod
    def draw(self, image: np.ndarray, result: Result) -> np.ndarray:
        """The image [H, W, 3], blue first, with a result painted by the framework's visualiser."""

    def painted_labels(self, result: Segmentation) -> np.ndarray:
        """Labels [H, W], with a number that no class has where a background stays as it is."""
        names = np.array([name == "background" for name in self.classes])
        return np.where(names[result.labels], len(names), result.labels).astype(np.int64)

    @property
    def names_for_matplotlib(self) -> list[str]:
        """The classes, without its formulas, which stand between two dollars."""
        return [name.replace("$", r"\$") for name in self.classes]

    @abstractmethod
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of the channels in RGB order, as the model subtracts and divides.

        Raises UsageError where the model takes blue first.
        """

    def name_classes(
        self,
        number: int,
        names: Sequence[str] | None,
        configured: Sequence[str] | None,
        colours: Any = None,
    ) -> None:
        """Takes names and colours if there is one for each of ``number`` classes.

        Args:
            names: in the checkpoint, which knows what the model has learnt.
            configured: in the config or its data, for a checkpoint without names.
            colours: one for each class.
        """
        if names is None:
            names = configured
        elif configured is not None and len(names) == number == len(configured):
            if other := difference(names, configured, spelling=self.task == "segmentation"):
                self.note = (
                    f"class {other[0]} is {other[1]!r} in the checkpoint and {other[2]!r} in the "
                    "config: the checkpoint's names are taken"
                )
        self.colours = palette(number)
        if isinstance(colours, (list, tuple)) and len(colours) == number:
            self.colours = [tuple(int(value) for value in colour) for colour in colours]
        if names is not None and len(names) == number:
            self.classes = [str(name) for name in names]
            return
        self.classes = [str(index) for index in range(number)]
        found = "no class names" if names is None else f"{len(names)} class names"
        self.note = f"{found} for {number} classes in checkpoint and config: they are numbers"


def load_predictor(
    config: str,
    weights: str | None,
    *,
    device: str | None = None,
    options: Sequence[str] = (),
) -> Predictor:
    """The model of a config with the weights of a checkpoint of either framework.

    Args:
        config: a Detectron2 .yaml or an OpenMMLab .py file, or its place in our configs.
        weights: read without executing anything in it; None keeps the model's initialisation.
        device: None: CUDA where there is one, else the CPU.
        options: KEY VALUE pairs for Detectron2, KEY=VALUE for OpenMMLab.

    Raises:
        UsageError: files, options or a device that cannot be used or do not fit each other.
    """
    path = find_config(config)
    if weights is not None:
        if not os.path.isfile(weights):
            raise UsageError(f"the checkpoint {weights} does not exist")
        elsa_weights.read_ahead(weights)
    place = _device(device)
    if path.endswith(YAML):
        from .d2 import Detectron2Predictor

        return Detectron2Predictor(path, weights, place, options)
    from .mm import OpenMMLabPredictor

    return OpenMMLabPredictor(path, weights, place, options)


def find_config(config: str) -> str:
    """A file, or with a name as in a clone (configs/mmdet/...) the installed copy of it."""
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
        raise UsageError(f"--device {name} is no device of PyTorch") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name} needs a CUDA device, PyTorch finds none")
    return name
