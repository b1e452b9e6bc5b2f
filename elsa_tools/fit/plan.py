"""What a training is made of, for the writers of configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .choose import Choice
from .dataset import DataSet


@dataclass(frozen=True)
class Plan:
    """A training.

    Args:
        framework: "detectron2", "mmdet" or "mmseg".
        model: a key of `choose.MODELS`.
        weights: file to start from, or None.
        seed: of weights and order.
        work: folder of logs and checkpoints.
    """

    framework: str
    data: DataSet
    choice: Choice
    model: str
    weights: Path | None
    seed: int
    device: str
    work: Path

    @property
    def reasons(self) -> Mapping[str, str]:
        """Reasons by what was chosen."""
        return {rule.what: rule.why for rule in self.choice.rules}
