"""Where the scalars of a training go."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.defaults import default_writers
from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.preemption import REFUSED, TrainingEnded, max_over_ranks
from elsa_core.runtime.trackers import TRACKERS, Tracker

TENSORBOARD = "tensorboard"


class TrackerWriter(EventWriter):
    """Writes what JSONWriter writes to a tracker of `elsa_core.runtime.trackers`.

    Args:
        name: of the tracker.
        cfg: of the training.
        window_size: the iterations of which a noisy scalar's median is taken.
    """

    def __init__(self, name: str, cfg: CfgNode, window_size: int = 20) -> None:
        self.kind, self.cfg, self.window_size = TRACKERS[name], cfg, window_size
        self.tracker: Tracker | None = None
        self.last = -1

    def start(self, resumes: bool) -> None:
        """Raises UsageError if the tracker cannot start or continue a run."""
        folder, project = self.cfg.OUTPUT_DIR, self.cfg.LOG.PROJECT
        self.tracker = self.kind(folder, project, "iteration", resumes=resumes)
        self.tracker.log_config(self.cfg, self.cfg.dump())

    def write(self) -> None:
        if self.tracker is None:
            return
        new: dict[int, dict[str, float]] = {}
        latest = get_event_storage().latest_with_smoothing_hint(self.window_size)
        for name, (value, iteration) in latest.items():
            if iteration > self.last:
                new.setdefault(iteration, {})[name] = value
        for iteration in sorted(new):
            self.tracker.log(new[iteration], iteration)
        self.last = max([self.last, *new])

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.close()


class TrackersHook(HookBase):
    """Starts the runs of trackers before a training, or refuses it.

    Args:
        writers: of the main process.
    """

    def __init__(self, writers: Sequence[EventWriter]) -> None:
        self.writers = [writer for writer in writers if isinstance(writer, TrackerWriter)]

    def before_train(self) -> None:
        failure = ""
        try:
            for writer in self.writers:
                writer.start(resumes=self.trainer.start_iter > 0)
        except UsageError as error:
            failure = str(error)
        if max_over_ranks(bool(failure)):
            raise TrainingEnded(REFUSED, failure or "the main process cannot start a tracker")


def build_writers(cfg: CfgNode, max_iter: int) -> list[EventWriter]:
    """Returns Detectron2's writers, and those of LOG.WRITERS."""
    writers = [
        writer
        for writer in default_writers(cfg.OUTPUT_DIR, max_iter)
        if TENSORBOARD in cfg.LOG.WRITERS or not isinstance(writer, TensorboardXWriter)
    ]
    return writers + [TrackerWriter(name, cfg) for name in cfg.LOG.WRITERS if name in TRACKERS]
