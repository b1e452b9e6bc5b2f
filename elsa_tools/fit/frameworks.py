"""How each framework is told to train and evaluate, and where it leaves its figures."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from elsa_core.ema import METRICS
from elsa_core.runtime.configs import find_config
from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.runtime.packages import is_missing

from .dataset import SEMANTIC
from .plan import Plan

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, float]


@dataclass(frozen=True)
class Framework:
    """A framework.

    Args:
        module: what must be installed.
        ending: of its configs.
        writer: module of this package with ``config_text`` and ``METRICS``.
        logs: pattern of its files of figures in the work folder, JSON lines.
        metrics: {its name of a metric: ours}.
        percent: factor that makes percent of a metric of objects.
        image_times: what its log says of the seconds for the evaluation of an image; a later one
            is looked for where there is none of those before.
        best: pattern of the best checkpoint in the work folder.
    """

    name: str
    title: str
    module: str
    ending: str
    writer: str
    logs: str
    metrics: dict[str, str]
    percent: float
    image_times: tuple[str, ...]
    best: str

    def config_text(self, plan: Plan) -> str:
        try:
            text: str = import_module(f".{self.writer}", __package__).config_text(plan)
        except ImportError as error:
            raise UsageError(f"{self.title} cannot be imported: {one_line(error)}") from error
        return text

    def train(self, config: Path, resume: bool) -> list[str]:
        """Return the command that trains."""
        resuming = ["--resume"] if resume else []
        if self.name == "detectron2":
            return [sys.executable, _script("train_net"), "--config-file", str(config), *resuming]
        return [sys.executable, _script("train"), str(config), *resuming]

    def evaluate(self, config: Path, checkpoint: Path, out: Path, task: str) -> list[str]:
        """Return the command that evaluates a checkpoint and writes to a folder.

        MMDetection's results are where its config says.
        """
        if self.name == "detectron2":
            pairs = ["MODEL.WEIGHTS", str(checkpoint), "OUTPUT_DIR", str(out)]
            return [*self.train(config, False), "--eval-only", *pairs]
        command = [sys.executable, _script("test"), str(config), str(checkpoint)]
        command += ["--work-dir", str(out)]
        return [*command, "--out", str(out / "maps")] if task == SEMANTIC else command

    def results(self, out: Path, task: str) -> Path:
        """Return what `evaluate` has written for "bbox", "segm" or "semantic"."""
        if self.name == "detectron2":
            name = "sem_seg_predictions" if task == SEMANTIC else "coco_instances_results"
            return out / "inference" / f"{name}.json"
        if task == SEMANTIC:
            return out / "maps"
        return out / f"results.{task}.json"

    def history(self, work: Path) -> list[Row]:
        """Return the figures of a training by iteration; those of a resumed one replace its own."""
        rows: dict[int, Row] = {}
        for record in self._records(work):
            step = record.get("step", record.get("iteration"))
            if step is None:
                continue
            evaluated = any(name in record for name in self.metrics)
            # Detectron2 counts iterations from 0, and the last evaluation from 1.
            if "iteration" in record and not (evaluated and "total_loss" not in record):
                step += 1
            row = rows.setdefault(int(step), {"iteration": step})
            row.update(self._figures(record))
        return [rows[step] for step in sorted(rows)]

    def _figures(self, record: dict[str, Any]) -> Iterator[tuple[str, float]]:
        trains = "loss" in record or "total_loss" in record
        for key, value in record.items():
            # MMEngine's "time" of an evaluation is that of an image.
            if not isinstance(value, (int, float)) or (key == "time" and not trains):
                continue
            name = key.removeprefix(METRICS)
            if name in self.metrics:
                factor = 1 if name.endswith("mIoU") else self.percent
                yield f"{'val' if name == key else 'val_ema'}/{self.metrics[name]}", factor * value
            elif key == "total_loss":
                yield "loss", value
            elif key in ("lr", "time") or key.startswith("loss"):
                yield key, value

    def _records(self, work: Path) -> Iterator[dict[str, Any]]:
        """In the order of time, without lines that are being written or were cut by a kill."""
        for path in sorted(work.glob(self.logs)):
            with path.open(encoding="utf-8", errors="replace") as lines:
                for line in filter(lambda one: one.endswith("\n"), lines):
                    with suppress(json.JSONDecodeError):
                        yield json.loads(line)

    def image_seconds(self, log: str) -> float | None:
        """Return the seconds for the evaluation of an image, without the first ones of a run."""
        for pattern in self.image_times:
            if found := re.findall(pattern, log):
                return float(found[-1])
        return None

    def best_checkpoint(self, work: Path) -> Path | None:
        """Return the checkpoint with the best score, or None."""
        found = sorted(work.glob(self.best), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else None


_MM = dict(
    ending=".py",
    writer="config_mm",
    logs="*/vis_data/scalars.json",
    percent=100.0,
    # The mean of the last ten images; of all, where they are fewer.
    image_times=(
        r"Iter\(val\) \[[^]]*\]\s+eta: .*? time: ([\d.]+)",
        r"Iter\(val\) .* time: ([\d.]+)",
    ),
    best="best_*.pth",
)
FRAMEWORKS: dict[str, Framework] = {
    "detectron2": Framework(
        "detectron2",
        "Detectron2",
        "detectron2",
        ending=".yaml",
        writer="config_d2",
        logs="metrics.json",
        metrics={
            "bbox/AP": "box AP",
            "bbox/AP50": "box AP50",
            "segm/AP": "mask AP",
            "segm/AP50": "mask AP50",
            "sem_seg/mIoU": "mIoU",
        },
        percent=1,
        image_times=(r"Total inference time: .* \(([\d.]+) s / iter",),
        best="model_best.pth",
    ),
    "mmdet": Framework(
        "mmdet",
        "MMDetection",
        "mmdet",
        metrics={
            "coco/bbox_mAP": "box AP",
            "coco/bbox_mAP_50": "box AP50",
            "coco/segm_mAP": "mask AP",
            "coco/segm_mAP_50": "mask AP50",
        },
        **_MM,  # type: ignore[arg-type]
    ),
    "mmseg": Framework("mmseg", "MMSegmentation", "mmseg", metrics={"mIoU": "mIoU"}, **_MM),  # type: ignore[arg-type]
}


def _script(name: str) -> str:
    """Return the path of a command line of tools/, in an installed package or in a clone."""
    package = "elsa_d2/tools" if name == "train_net" else "elsa_mm/.mim/tools"
    return find_config(f"{name}.py", ROOT / package, ROOT / "tools")


def choose_framework(name: str | None, task: str) -> Framework:
    """Return the framework of that name, or the first one that is installed and has the task.

    Raises:
        UsageError: it is not installed, or lacks the task.
    """
    able = ["detectron2", "mmseg" if task == SEMANTIC else "mmdet"]
    if name is not None and name not in able:
        raise UsageError(f"--framework {name} cannot train {task}: give one of {', '.join(able)}")
    for one in [name] if name else able:
        if not is_missing(FRAMEWORKS[one].module):
            return FRAMEWORKS[one]
    needed = FRAMEWORKS[name].title if name else " or ".join(FRAMEWORKS[one].title for one in able)
    raise UsageError(f"{task} needs {needed}, which is not installed in {sys.executable}")
