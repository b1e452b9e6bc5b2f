"""Experiment trackers get what the frameworks' own logs have, and continue their runs."""

import json
import math
import re
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmengine")
pytest.importorskip("wandb", reason="the tracker wandb is not installed")
pytest.importorskip("mlflow", reason="the tracker mlflow is not installed")

import mlflow
import wandb
from detectron2.engine import TrainerBase, hooks
from mm_tiny import CONFIGS, options
from mmengine.config import Config
from mmengine.visualization import Visualizer

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.preemption import TrainingEnded
from elsa_core.runtime.trackers import FILE, check_trackers
from elsa_d2 import load_config
from elsa_d2.engine.writers import TrackersHook, build_writers
from elsa_mm import MLflowTracker, WandbTracker
from elsa_mm.trackers import check_backends, start_trackers

BACKENDS = {"wandb": WandbTracker, "mlflow": MLflowTracker}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    mlflow.set_tracking_uri(None)


class Training(TrainerBase):
    """Iterations with two losses, of which each second one is evaluated."""

    def __init__(self, folder, trackers):
        super().__init__()
        cfg = load_config("", ["OUTPUT_DIR", str(folder), "LOG.WRITERS", str(trackers)])
        self.model, writers = torch.nn.Identity(), build_writers(cfg, 6)
        evaluate = hooks.EvalHook(
            2, lambda: {"bbox": {"AP": self.iter * 1.5, "AP-a (b)": math.nan}}
        )
        self.register_hooks([TrackersHook(writers), evaluate, hooks.PeriodicWriter(writers, 2)])

    def run_step(self):
        self.storage.put_scalars(total_loss=1 / (1 + self.iter), lr=0.1)


def in_detectron2(folder, trackers, start, end):
    """Returns what metrics.json has, and the axis of its iterations."""
    Training(folder, trackers).train(start, end)
    lines = (folder / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines], "iteration"


def visualizer_of(folder, trackers, start):
    backends = [dict(type=BACKENDS[name].__name__) for name in trackers]
    visualizer = Visualizer(
        vis_backends=[dict(type="LocalVisBackend"), *backends], save_dir=str(folder / f"run{start}")
    )
    config = Config(dict(work_dir=str(folder), resume=start > 0), filename=__file__)
    visualizer.add_config(config)
    return visualizer


def in_mmengine(folder, trackers, start, end):
    """Returns what scalars.json has, and the axis of its iterations."""
    visualizer = visualizer_of(folder, trackers, start)
    for step in range(start, end):
        visualizer.add_scalars({"loss": 1 / (1 + step), "iter": step}, step=step)
    visualizer.add_scalars({"coco/bbox_mAP": 0.5, "coco/a (b)": math.nan}, step=end)
    visualizer.close()
    logs = sorted(folder.glob("run*/vis_data/scalars.json"))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()], "step"


def of_mlflow(folder):
    """{(name, step): value} of the only run."""
    (run,) = folder.glob("mlruns/*/*/metrics")
    found = {}
    for file in (path for path in run.rglob("*") if path.is_file()):
        for _, value, step in (line.split() for line in file.read_text().splitlines()):
            found[str(file.relative_to(run)), int(step)] = float(value)
    return found


def of_wandb(folder, axis):
    """The same of the only run, whose parts are files with records of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(folder.glob("wandb/*/run-*.wandb"))
    assert len({file.name for file in files}) == 1
    rows = []
    for content in (file.read_bytes() for file in files):
        place = 7
        while place + 7 < len(content):
            size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
            assert kind == 1  # a whole record
            place += 7 + size
            items = Record.FromString(content[place - size : place]).history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    names = {name for row in rows for name in row if name.startswith("_")}
    return flat([{n: v for n, v in row.items() if n not in names} for row in rows], axis)


def flat(lines, axis):
    values = [(n, line[axis], float(v)) for line in lines for n, v in line.items() if n != axis]
    return {(name, step): value for name, step, value in values}


@pytest.mark.slow
@pytest.mark.parametrize("train", [in_detectron2, in_mmengine])
def test_trackers_have_what_the_log_has(train, tmp_path):
    runs = []
    for start, end in ((0, 4), (4, 6)):  # the second one resumes
        lines, axis = train(tmp_path, ["wandb", "mlflow"], start, end)
        runs.append(json.loads((tmp_path / FILE).read_text()))
    assert runs[0] == runs[1]
    expected = flat(lines, axis)
    assert len({name for name, _ in expected}) == 4 and len(expected) > 8
    assert of_wandb(tmp_path, axis) == pytest.approx(expected, nan_ok=True)
    # Whose names cannot have parentheses.
    expected = {
        (re.sub("[()]", "_", name), step): value for (name, step), value in expected.items()
    }
    assert of_mlflow(tmp_path) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("train", [in_detectron2, in_mmengine])
def test_another_training_in_the_folder_is_another_run(train, tmp_path):
    runs = []
    for _ in range(2):
        train(tmp_path, ["mlflow"], 0, 2)
        runs.append(json.loads((tmp_path / FILE).read_text())["mlflow"])
    assert runs[0] != runs[1]


def test_images(tmp_path):
    visualizer = visualizer_of(tmp_path, ["mlflow"], 0)
    visualizer.add_image("val/a", torch.zeros(2, 2, 3, dtype=torch.uint8).numpy(), step=3)
    visualizer.close()
    assert list(tmp_path.glob("mlruns/*/*/artifacts/val/a_3.png"))


def refuse(*args, **kwargs):
    raise RuntimeError("no account\nnor network")


@pytest.mark.usefixtures("workplace")
def test_what_cannot_start_refuses_the_training(tmp_path, monkeypatch, digits, refusal):
    monkeypatch.setattr(wandb, "init", refuse)
    sentence = "wandb cannot start a run: no account"
    with pytest.raises(TrainingEnded) as end:
        Training(tmp_path, ["wandb"]).train(0, 2)
    assert end.value.status == 2 and end.value.sentence.startswith(sentence)
    runner = SimpleNamespace(visualizer=visualizer_of(tmp_path, ["wandb"], 0))
    with pytest.raises(UsageError, match=sentence):
        start_trackers(runner)
    Path("config.py").write_text(
        f"_base_ = [{str(CONFIGS['mmseg'])!r}]\n"
        "visualizer = dict(vis_backends=[dict(type='WandbTracker')])\n"
    )
    said = refusal("train", "config.py", "--work-dir", "out", *options("mmseg", digits))
    assert said.startswith(sentence)


@pytest.mark.parametrize(
    "name, message",
    [
        ("wandb", "LOG.WRITERS wandb needs the Python package wandb, which is missing in .*"),
        ("comet", "LOG.WRITERS must be of tensorboard, wandb, mlflow, got 'comet'"),
    ],
)
def test_unknown_and_missing_ones(name, message, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=message):
        check_trackers(["tensorboard", name], "LOG.WRITERS", ["tensorboard"])
    with pytest.raises(UsageError, match="the backend WandbTracker of wandb needs the Python pack"):
        WandbTracker(str(tmp_path))
    with pytest.raises(UsageError, match="the backend WandbVisBackend needs the Python package wa"):
        check_backends(dict(vis_backends=[dict(type="WandbVisBackend")]))
