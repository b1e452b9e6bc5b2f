"""The driver of the demo, with a training that takes no time."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import cv2
import pytest

from elsa_core.runtime.errors import UsageError
from elsa_tools.predict import load_inferencer
from examples.digits import predictions, report
from examples.digits.demo import Run, fingerprint, main
from examples.digits.trainings import DETECTRON2, MMDETECTION, TRAININGS, Training

PROGRAM = """
import json, pathlib, sys
out, resume, status = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with open(out / "runs.txt", "a") as runs:
    runs.write(resume + "\\n")
records = [{"iteration": i, "total_loss": 5 - i} for i in range(3)]
records.append({"iteration": 3, "bbox/AP": 40.0, "bbox/AP50": 60.0})
with open(out / "metrics.json", "a") as metrics:
    metrics.writelines(json.dumps(record) + "\\n" for record in records)
(out / "last_checkpoint").write_text("model_2.pth")
print("the last words")
sys.exit(status)
"""


class QuickTraining(Training):
    def iterations(self) -> int:
        return 3

    def command(self, out: Path, resume: bool) -> list[str]:
        return [sys.executable, "-c", PROGRAM, str(out), str(resume), *self.config_option]


@pytest.fixture
def training() -> QuickTraining:
    values = {one.name: getattr(DETECTRON2, one.name) for one in fields(DETECTRON2)}
    values |= {"name": "quick", "framework": "Quick", "task": "Counting", "config_option": ("0",)}
    return QuickTraining(**values | {"metrics": {"bbox/AP": "box AP", "bbox/AP50": "box AP50"}})


def attempts(run: Run) -> list[str]:
    return (run.out / "runs.txt").read_text().split()


@pytest.mark.slow
def test_finished_training_is_repeated_for_another_mark_alone(training, tmp_path, capsys):
    run = Run(training, tmp_path, "mark")
    run()
    assert run.state()["finished"] and run.state()["seconds"] > 0
    assert run.final_metrics() == {"box AP": 40.0, "box AP50": 60.0}
    run()
    assert attempts(run) == ["False"]
    assert "Quick, Counting: done before" in capsys.readouterr().out
    other = Run(training, tmp_path, "another mark")
    assert not other.state()["finished"]
    (run.out / "of_the_first").touch()
    other()
    assert attempts(other) == ["False"] and not (run.out / "of_the_first").exists()


@pytest.mark.slow
def test_failed_training_is_explained_and_resumed(training, tmp_path, capsys):
    failing = Run(replace(training, config_option=("3",)), tmp_path, "mark")
    with pytest.raises(UsageError, match="exit status 3, the end of .*last checkpoint"):
        failing()
    assert capsys.readouterr().err.endswith("the last words\n\n")
    spent = failing.state()["seconds"]
    run = Run(training, tmp_path, "mark")
    run()
    assert attempts(run) == ["False", "True"]
    assert run.state()["finished"] and run.state()["seconds"] > spent


def test_training_without_its_metrics_has_failed(training, tmp_path):
    training = replace(training, metrics={**training.metrics, "segm/AP": "mask AP"})
    with pytest.raises(UsageError, match="without its mask AP"):
        Run(training, tmp_path, "mark")()


def test_folder_of_others_is_refused(training, tmp_path):
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="holds files that the demo did not write"):
        Run(training, tmp_path, "mark")()
    assert (tmp_path / "quick" / "thesis.tex").read_text() == "precious"


def test_fingerprint_follows_the_data(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    (tmp_path / "meta.json").write_text('{"seed": 1}')
    assert fingerprint(tmp_path) != first


def test_half_written_record_is_left_out(training, tmp_path):
    (tmp_path / "metrics.json").write_text(
        '{"iteration": 0, "total_loss": 5}\n{"iteration": 1, "tot'
    )
    assert training.curves(tmp_path).loss == {0: 5}


def test_openmmlab_figures_of_all_attempts_in_percent(tmp_path):
    for time, records in {
        "20260101_000000": [{"step": 20, "loss": 3.0}, {"step": 40, "loss": 2.0}],
        "20260101_000100": [{"step": 40, "loss": 2.5}, {"step": 60, "coco/bbox_mAP": 0.25}],
    }.items():
        folder = tmp_path / time / "vis_data"
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text("".join(json.dumps(r) + "\n" for r in records))
    curves = MMDETECTION.curves(tmp_path)
    assert curves.loss == {20: 3.0, 40: 2.5}
    assert curves.final == {"box AP": 25.0}


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)
def test_configs_of_the_demo_exist_and_tell_their_length(training):
    assert training.config_path.is_file()
    assert training.iterations() > 100
    assert str(training.config_path) in training.command(Path("out"), resume=True)
    assert "--resume" in training.command(Path("out"), resume=True)
    assert "--resume" not in training.command(Path("out"), resume=False)


def test_table_has_a_row_a_framework():
    rows = [
        {"framework": "A", "task": "t", "box AP": 40.04, "seconds": 9.6, "parameters": 2_700_000},
        {"framework": "B", "task": "u", "mIoU": 61.0, "seconds": 100, "parameters": 3_000_000},
    ]
    lines = report.table(rows).splitlines()
    assert len(lines) == 4
    assert lines[2].split() == ["A", "t", "40.0", "-", "-", "-", "-", "10", "2.70", "M"]
    assert lines[3].split() == ["B", "u", "-", "-", "-", "-", "61.0", "100", "3.00", "M"]


@pytest.mark.slow
def test_pictures_show_truth_and_predictions(digits, tmp_path, monkeypatch):
    """Of an untrained model, which sees next to nothing."""
    (tmp_path / "last_checkpoint").write_text("iter_1.pth")
    untrained = []

    def load(config, weights, **options):
        untrained.append(load_inferencer(config, None, **options))
        return untrained[0]

    monkeypatch.setattr(predictions, "load_inferencer", load)
    path = tmp_path / "a.png"
    parameters = predictions.draw_predictions(MMDETECTION, tmp_path, digits, path)
    assert parameters == 2_748_788
    assert min(cv2.imread(str(path)).shape[:2]) > 500
    files = sorted((digits / "images" / "validation").glob("*.jpg"))[:2]
    for file, truth in zip(files, predictions.true_detections(digits, files), strict=True):
        image = cv2.imread(str(file))
        changed = (untrained[0].draw(image, truth) != image).any(-1)
        assert changed[truth.masks.any(0)].mean() > 0.9
        assert changed.mean() < 0.9


@pytest.mark.parametrize("arguments", [["--only", "caffe"], ["--unknown"]])
def test_unknown_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err
