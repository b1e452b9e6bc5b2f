"""The three trainings of the demo: what is run, and where each framework leaves its figures."""

import json
import os
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Curves:
    """Figures by iteration: the training loss, and held-out metrics in percent by their name."""

    loss: dict[int, float]
    metrics: dict[str, dict[int, float]]

    @property
    def final(self) -> dict[str, float]:
        """Every metric at its last evaluation."""
        return {name: values[max(values)] for name, values in self.metrics.items()}


class Training(ABC):
    """A training and its evaluation through one of the project's command lines."""

    name: str  # also the folder's
    framework: str
    task: str
    config: str  # in the repository
    metric_names: dict[str, str]  # the framework's names of the metrics, and ours

    @property
    def config_path(self) -> Path:
        return REPOSITORY / self.config

    @abstractmethod
    def command(self, out: Path, resume: bool) -> list[str]:
        """The command line that trains in the folder `out` and evaluates."""

    @cached_property
    @abstractmethod
    def iterations(self) -> int:
        """Length of the training."""

    @abstractmethod
    def records(self, out: Path) -> Iterator[dict[str, Any]]:
        """What the framework has logged to `out`, in the order of time."""

    @property
    @abstractmethod
    def keys(self) -> tuple[str, str]:
        """Names of the iteration and of the loss in a record."""

    def curves(self, out: Path) -> Curves:
        iteration_key, loss_key = self.keys
        loss: dict[int, float] = {}
        metrics: dict[str, dict[int, float]] = defaultdict(dict)
        for record in self.records(out):
            iteration = record.get(iteration_key)
            if iteration is None:
                continue
            if loss_key in record:
                loss[iteration] = record[loss_key]
            for theirs, ours in self.metric_names.items():
                if theirs in record:
                    metrics[ours][iteration] = self.percent(record[theirs])
        return Curves(loss, dict(metrics))

    def percent(self, value: float) -> float:
        return value

    def environment(self) -> dict[str, str]:
        """Environment variables: the repository importable, output not held back."""
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}

    def checkpoint(self, out: Path) -> Path | None:
        """The newest checkpoint, which both frameworks name in a file `last_checkpoint`."""
        pointer = out / "last_checkpoint"
        if not pointer.is_file():
            return None
        return out / Path(pointer.read_text().strip()).name


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file that another process may be writing: a line without end is left out."""
    with path.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


class Detectron2Training(Training):
    """Mask R-CNN in Detectron2."""

    name = "detectron2"
    framework = "Detectron2"
    task = "Mask R-CNN"
    config = "configs/detectron2/digits/mask_rcnn_elsa_swin_digits.yaml"
    keys = ("iteration", "total_loss")
    metric_names = {
        "bbox/AP": "box AP",
        "bbox/AP50": "box AP50",
        "segm/AP": "mask AP",
        "segm/AP50": "mask AP50",
    }

    def command(self, out: Path, resume: bool) -> list[str]:
        script = str(REPOSITORY / "tools" / "train_net.py")
        resuming = ["--resume"] if resume else []
        config = ["--config-file", str(self.config_path)]
        return [sys.executable, script, *config, *resuming, "OUTPUT_DIR", str(out)]

    @cached_property
    def iterations(self) -> int:
        return int(self.load_config().SOLVER.MAX_ITER)

    def load_config(self) -> Any:
        """The training's Detectron2 config."""
        from elsa_d2 import load_config

        return load_config(str(self.config_path))

    def records(self, out: Path) -> Iterator[dict[str, Any]]:
        path = out / "metrics.json"
        if path.is_file():
            yield from _json_lines(path)


class OpenMMLabTraining(Training):
    """A training through MMEngine's runner, on the CPU: `make setup` builds mmcv for CPUs only."""

    keys = ("step", "loss")

    def environment(self) -> dict[str, str]:
        return super().environment() | {"CUDA_VISIBLE_DEVICES": ""}

    def command(self, out: Path, resume: bool) -> list[str]:
        script = str(REPOSITORY / "tools" / "train.py")
        resuming = ["--resume"] if resume else []
        return [sys.executable, script, str(self.config_path), "--work-dir", str(out), *resuming]

    @cached_property
    def iterations(self) -> int:
        from mmengine.config import Config

        return int(Config.fromfile(str(self.config_path)).train_cfg.max_iters)

    def records(self, out: Path) -> Iterator[dict[str, Any]]:
        for path in sorted(out.glob("*/vis_data/scalars.json")):
            yield from _json_lines(path)


class MMDetectionTraining(OpenMMLabTraining):
    """Mask R-CNN in MMDetection."""

    name = "mmdetection"
    framework = "MMDetection"
    task = "Mask R-CNN"
    config = "configs/mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py"
    metric_names = {
        "coco/bbox_mAP": "box AP",
        "coco/bbox_mAP_50": "box AP50",
        "coco/segm_mAP": "mask AP",
        "coco/segm_mAP_50": "mask AP50",
    }

    def percent(self, value: float) -> float:
        return 100 * value


class MMSegmentationTraining(OpenMMLabTraining):
    """UPerNet in MMSegmentation."""

    name = "mmsegmentation"
    framework = "MMSegmentation"
    task = "UPerNet"
    config = "configs/mmseg/digits/elsa-swin_upernet_digits.py"
    metric_names = {"mIoU": "mIoU"}


TRAININGS: tuple[Training, ...] = (
    Detectron2Training(),
    MMDetectionTraining(),
    MMSegmentationTraining(),
)
