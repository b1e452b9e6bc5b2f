"""Experiment trackers, whose runs a resumed training continues.

The scalars have the names and values of the framework's own log. Weights & Biases reads its usual
environment variables, such as WANDB_MODE; MLflow's MLFLOW_TRACKING_URI names its server. Without
it, the runs are files in the folder ``mlruns`` of the training.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError, one_line
from .files import replacing
from .packages import need

PROJECT = "elsa-swin"
FILE = "trackers.json"  # {tracker: the identity of the training's run}
_NOT_OF_MLFLOW = re.compile(r"[^/\w.\- :]")
logger = logging.getLogger(__name__)


class Tracker:
    """A run of a tracker.

    Args:
        folder: of the training, by which the run is called.
        project: the tracker's project or experiment.
        axis: name of the number of iterations in the framework's log.
        resumes: continue the run of the folder's training.

    Raises:
        UsageError: the package is missing, or the tracker cannot start a run.
    """

    name = ""

    def __init__(self, folder: str, project: str, axis: str, *, resumes: bool) -> None:
        self.module: Any = need(self.name, f"the tracker {self.name}")
        self.folder, self.axis = Path(folder).resolve(), axis
        known = _known_runs(self.folder) if resumes else {}
        try:
            run = self._start(project, known.get(self.name))
        except Exception as error:  # of the network, the account, the disk
            raise UsageError(f"{self.name} cannot start a run: {one_line(error)}") from error
        with replacing(self.folder / FILE) as file:
            file.write(json.dumps({**_known_runs(self.folder), self.name: run}).encode())

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        raise NotImplementedError

    def log_image(self, name: str, image: Any, step: int) -> None:
        """Log an RGB image of shape [H, W, 3] and type uint8."""
        raise NotImplementedError

    def log_config(self, config: Mapping[str, Any], text: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def _start(self, project: str, run: str | None) -> str:
        """Start or continue a run; return its identity."""
        raise NotImplementedError


class Wandb(Tracker):
    """A run of Weights & Biases. Offline, a resumed training writes another part of the run."""

    name = "wandb"

    def _start(self, project: str, run: str | None) -> str:
        identity = run or uuid.uuid4().hex
        options = dict(id=identity, resume="allow", name=self.folder.name, dir=str(self.folder))
        self.run = self.module.init(project=project, **options)
        self.run.define_metric("*", step_metric=self.axis)
        return identity

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.run.log({**scalars, self.axis: step})

    def log_image(self, name: str, image: Any, step: int) -> None:
        self.run.log({name: self.module.Image(image), self.axis: step})

    def log_config(self, config: Mapping[str, Any], text: str) -> None:
        self.run.config.update(dict(config), allow_val_change=True)

    def close(self) -> None:
        self.run.finish()


class MLflow(Tracker):
    """A run of MLflow. Characters that its names cannot have become underscores."""

    name = "mlflow"

    def _start(self, project: str, run: str | None) -> str:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            self.module.set_tracking_uri((self.folder / "mlruns").as_uri())
        self.module.set_experiment(project)
        name = None if run else self.folder.name
        started: str = self.module.start_run(run_id=run, run_name=name).info.run_id
        return started

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        named = {_NOT_OF_MLFLOW.sub("_", name): float(value) for name, value in scalars.items()}
        self._try(self.module.log_metrics, named, step=step)

    def log_image(self, name: str, image: Any, step: int) -> None:
        self._try(self.module.log_image, image, f"{_NOT_OF_MLFLOW.sub('_', name)}_{step}.png")

    def log_config(self, config: Mapping[str, Any], text: str) -> None:
        self._try(self.module.log_text, text, "config.txt")

    def close(self) -> None:
        self.module.end_run()

    def _try(self, function: Any, *args: Any, **kwargs: Any) -> None:
        """A server that cannot be reached ends no training."""
        try:
            function(*args, **kwargs)
        except self.module.MlflowException as error:
            logger.warning(f"mlflow: {one_line(error)}")


TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (Wandb, MLflow)}


def check_trackers(names: Iterable[str], where: str, others: Iterable[str] = ()) -> None:
    """Raise UsageError unless all ``names`` are of trackers that are installed.

    Args:
        where: the setting, for messages.
        others: further names, of packages.
    """
    known = [*others, *TRACKERS]
    for name in names:
        if name not in known:
            raise UsageError(f"{where} must be of {', '.join(known)}, got {name!r}")
        need(name, f"{where} {name}")


def _known_runs(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
