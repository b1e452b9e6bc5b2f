"""The three trainings of the demo: what is run, and where each framework leaves its figures."""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Training:
    """A training and its evaluation through one of the project's command lines.

    Attributes:
        name: name of the folder of results.
        config: path in the repository, as that of ``script``.
        config_option, out_option: what precedes the config and the folder on the command line.
        variables: environment variables of the process.
        logs: pattern of the logs, files of JSON lines, in the folder of results.
        iteration_key, loss_key: names in a line of the logs.
        metrics: the framework's names of the metrics, and ours.
        percent: factor that makes percent of a metric.
    """

    name: str
    framework: str
    task: str
    config: str
    script: str
    config_option: tuple[str, ...]
    out_option: str
    logs: str
    iteration_key: str
    loss_key: str
    metrics: Mapping[str, str]
    percent: float = 1
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def config_path(self) -> Path:
        return REPOSITORY / self.config

    def command(self, out: Path, resume: bool) -> list[str]:
        """The command line that trains in the folder `out` and evaluates."""
        config = [*self.config_option, str(self.config_path)]
        resuming = ["--resume"] if resume else []
        script = str(REPOSITORY / self.script)
        return [sys.executable, script, *config, *resuming, self.out_option, str(out)]

    def environment(self) -> dict[str, str]:
        """Environment variables: the repository importable, output not held back."""
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **ours, **self.variables}

    def iterations(self) -> int:
        """Length of the training."""
        if self.config.endswith(".yaml"):
            from elsa_d2 import load_config

            return int(load_config(str(self.config_path)).SOLVER.MAX_ITER)
        from mmengine.config import Config

        return int(Config.fromfile(str(self.config_path)).train_cfg.max_iters)

    def curves(self, out: Path) -> Curves:
        """The figures that the framework has logged to `out` so far."""
        loss: dict[int, float] = {}
        metrics: dict[str, dict[int, float]] = defaultdict(dict)
        for record in self._records(out):
            iteration = record.get(self.iteration_key)
            if iteration is None:
                continue
            if self.loss_key in record:
                loss[iteration] = record[self.loss_key]
            for theirs, ours in self.metrics.items():
                if theirs in record:
                    metrics[ours][iteration] = self.percent * record[theirs]
        return Curves(loss, dict(metrics))

    def _records(self, out: Path) -> Iterator[dict[str, Any]]:
        """In the order of time; a line that is being written is left out."""
        for path in sorted(out.glob(self.logs)):
            with path.open() as lines:
                yield from (json.loads(line) for line in lines if line.endswith("\n"))

    def checkpoint(self, out: Path) -> Path | None:
        """The newest checkpoint, which both frameworks name in a file `last_checkpoint`."""
        pointer = out / "last_checkpoint"
        if not pointer.is_file():
            return None
        return out / Path(pointer.read_text().strip()).name


OPENMMLAB: dict[str, Any] = {
    "script": "tools/train.py",
    "config_option": (),
    "out_option": "--work-dir",
    "logs": "*/vis_data/scalars.json",
    "iteration_key": "step",
    "loss_key": "loss",
    "variables": {"CUDA_VISIBLE_DEVICES": ""},  # `make setup` compiles mmcv for CPUs only
}
DETECTRON2 = Training(
    name="detectron2",
    framework="Detectron2",
    task="Mask R-CNN",
    config="configs/detectron2/digits/mask_rcnn_elsa_swin_digits.yaml",
    script="tools/train_net.py",
    config_option=("--config-file",),
    out_option="OUTPUT_DIR",
    logs="metrics.json",
    iteration_key="iteration",
    loss_key="total_loss",
    metrics={
        "bbox/AP": "box AP",
        "bbox/AP50": "box AP50",
        "segm/AP": "mask AP",
        "segm/AP50": "mask AP50",
    },
)
MMDETECTION = Training(
    name="mmdetection",
    framework="MMDetection",
    task="Mask R-CNN",
    config="configs/mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py",
    metrics={
        "coco/bbox_mAP": "box AP",
        "coco/bbox_mAP_50": "box AP50",
        "coco/segm_mAP": "mask AP",
        "coco/segm_mAP_50": "mask AP50",
    },
    percent=100,
    **OPENMMLAB,
)
MMSEGMENTATION = Training(
    name="mmsegmentation",
    framework="MMSegmentation",
    task="UPerNet",
    config="configs/mmseg/digits/elsa-swin_upernet_digits.py",
    metrics={"mIoU": "mIoU"},
    **OPENMMLAB,
)
TRAININGS = (DETECTRON2, MMDETECTION, MMSEGMENTATION)
