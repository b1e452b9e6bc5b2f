"""The interface of a model with its test pipeline, common to frameworks and exported models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from elsa_core.data.classes import difference
from elsa_tools.export.record import Resize

from .results import Result, Segmentation, palette

# Bytes that a result takes until it is drawn, at most, and those of each pixel: a hundred masks in
# all their copies, or the logits of a class, twice; pixels that a picture has.
MEMORY, OF_MASKS, OF_CLASS, MOST_PAINTED = 4 * 10**9, 500, 8, 25_000_000


class Inferencer(ABC):
    """A model with its test pipeline.

    Attributes:
        framework: "detectron2", "mmdet" or "mmseg"; of an exported model, where it comes from.
        task: "detection" or "segmentation".
        model: the framework's own, in evaluation mode; an `Executor` of an exported model.
        classes: a name for each class; numbers where none are known, which ``note`` tells.
        colours: an RGB colour for each class.
        channels: the number that images of `elsa_core.data.channels` must have; None: RGB images.
        model_seconds: what the model took in the last prediction, without the test pipeline.
    """

    framework: str
    task: str
    model: Any
    classes: list[str]
    colours: list[tuple[int, int, int]]
    note: str | None = None
    channels: int | None = None
    model_seconds: float = 0.0

    @property
    def most_pixels(self) -> int:
        """The most pixels of an image whose results fit into MEMORY until they are drawn."""
        of_pixel = OF_CLASS * len(self.classes) if self.task == "segmentation" else OF_MASKS
        return min(MOST_PAINTED, MEMORY // of_pixel)

    @abstractmethod
    def predict(self, image: np.ndarray) -> Result:
        """Everything found in an image of `elsa_tools.predict.inputs.read_image`."""

    @abstractmethod
    def draw(self, image: np.ndarray, result: Result) -> np.ndarray:
        """The image [H, W, 3], blue first, with a result painted on it, by the framework's
        visualiser where there is one."""

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

    @abstractmethod
    def resize(self) -> Resize | None:
        """The resize of the test pipeline; None: images keep their size.

        Raises UsageError where the test pipeline changes images in another way.
        """

    @abstractmethod
    def thresholds(self) -> tuple[float, float | None]:
        """A detector's least score, and the least probability in a mask: None without masks."""

    def name_classes(
        self,
        number: int,
        names: Sequence[str] | None,
        configured: Sequence[str] | None,
        colours: Any = None,
    ) -> None:
        """Sets ``classes`` and ``colours``, if there is one of each for every class.

        Args:
            number: of classes of the model.
            names: in the checkpoint; they go first.
            configured: in the config or its data, used where the checkpoint has none.
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
            self.colours = [(int(r), int(g), int(b)) for r, g, b in colours]
        if names is not None and len(names) == number:
            self.classes = [str(name) for name in names]
            return
        self.classes = [str(index) for index in range(number)]
        found = "no class names" if names is None else f"{len(names)} class names"
        self.note = f"{found} for {number} classes in checkpoint and config: they are numbers"
