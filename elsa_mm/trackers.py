"""Visualization backends of experiment trackers, whose runs a resumed training continues."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import VISBACKENDS
from mmengine.visualization.vis_backend import BaseVisBackend

from elsa_core.runtime.packages import need
from elsa_core.runtime.trackers import PROJECT, MLflow, Tracker, Wandb, check_trackers

from .nested import walk

_PACKAGES = {
    "TensorboardVisBackend": "tensorboard",
    "WandbVisBackend": "wandb",
    "MLflowVisBackend": "mlflow",
}


class TrackerVisBackend(BaseVisBackend):
    """Writes what LocalVisBackend writes to a tracker of `elsa_core.runtime.trackers`.

    MMEngine's backends begin a new run for each start of a training, and count the calls instead of
    the iterations (W&B). The run starts with the training: with `tools/train.py` before it,
    otherwise with the first scalars.

    Args:
        save_dir: set by the visualizer, in the work directory.
        project: the tracker's project or experiment.

    Raises:
        UsageError: the tracker is not installed.
    """

    kind: type[Tracker]

    def __init__(self, save_dir: str, project: str = PROJECT) -> None:
        super().__init__(save_dir)
        self.project = project
        check_trackers([self.kind.name], f"the backend {type(self).__name__} of")
        self.config: Config | None = None
        self.tracker: Tracker | None = None

    @property
    def experiment(self) -> Tracker:
        """The run, which starts with the first call. Raises UsageError if it cannot."""
        if self.tracker is None:
            config = self.config or Config({})
            folder = config.get("work_dir") or str(Path(self._save_dir).parents[1])
            resumes = bool(config.get("resume"))
            self.tracker = self.kind(folder, self.project, "step", resumes=resumes)
            self.tracker.log_config(config.to_dict(), config.pretty_text)
        return self.tracker

    def _init_env(self) -> None:
        """Nothing: `experiment` starts the run."""

    def add_config(self, config: Config, **kwargs: Any) -> None:
        self.config = config

    def add_image(self, name: str, image: Any, step: int = 0, **kwargs: Any) -> None:
        self.experiment.log_image(name, image, step)

    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        self.experiment.log({name: float(value)}, step)

    def add_scalars(
        self,
        scalar_dict: Mapping[str, Any],
        step: int = 0,
        file_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.experiment.log({name: float(value) for name, value in scalar_dict.items()}, step)

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.close()


@VISBACKENDS.register_module()
class WandbTracker(TrackerVisBackend):
    """`TrackerVisBackend` of Weights & Biases."""

    kind = Wandb


@VISBACKENDS.register_module()
class MLflowTracker(TrackerVisBackend):
    """`TrackerVisBackend` of MLflow."""

    kind = MLflow


def check_backends(visualizer: Any) -> None:
    """Raises UsageError if one of MMEngine's own backends in a visualizer's config needs a package
    that is missing."""
    for node in walk(visualizer or {}):
        if package := _PACKAGES.get(str(node.get("type"))):
            need(package, f"the backend {node['type']}")


def start_trackers(runner: Any) -> None:
    """Starts the runs of a runner's trackers. Raises UsageError if one cannot."""
    if is_main_process():
        for backend in runner.visualizer._vis_backends.values():
            if isinstance(backend, TrackerVisBackend):
                backend.experiment  # noqa: B018
