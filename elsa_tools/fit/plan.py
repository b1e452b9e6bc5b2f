"""What a training is made of, for the writers of configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .choose import SMALL, Choice
from .dataset import BOXES, INSTANCES, SEMANTIC, DataSet

HEADS = {INSTANCES: "Mask R-CNN", BOXES: "Faster R-CNN", SEMANTIC: "UPerNet"}
BACKBONES = {SMALL: "a small ELSA-Swin", "volo_d1": "ELSA-VOLO-D1"}


@dataclass(frozen=True)
class Plan:
    """A training.

    Args:
        framework: "detectron2", "mmdet" or "mmseg".
        model: a key of `choose.MODELS`.
        weights: file to start from, or None.
        seed: of weights and order.
        work: folder of logs and checkpoints.
        writers: "tensorboard" and trackers that the figures go to, besides the framework's log.
    """

    framework: str
    data: DataSet
    choice: Choice
    model: str
    weights: Path | None
    seed: int
    device: str
    work: Path
    writers: tuple[str, ...] = ()

    @property
    def results(self) -> Path:
        """Prefix of the results of MMDetection, those that `Framework.results` finds."""
        return self.work.parent / "results" / "results"

    @property
    def reasons(self) -> Mapping[str, str]:
        """Reasons by what was chosen."""
        return {rule.what: rule.why for rule in self.choice.rules}

    @property
    def head(self) -> str:
        """Name of the method."""
        return HEADS[self.data.task]

    @property
    def title(self) -> str:
        """Method and backbone."""
        return f"{self.head} with {BACKBONES.get(self.model, f'ELSA-Swin-{self.model.upper()}')}"
