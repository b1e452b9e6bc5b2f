"""`elsa fit` from a folder to a trained model, as a user runs it."""

import json
import os
import re
import signal

import fit_folders
import pytest
from fit_forks import Fork, run_fit
from killing import fork, statuses_of

from elsa_core.param_groups import NAMES
from elsa_tools.fit import frameworks, process
from elsa_tools.fit.cli import main
from elsa_tools.fit.frameworks import FRAMEWORKS

# Figures have been logged.
TRAINING = ("fit_forks.wait", "training", 1)


@pytest.fixture
def forks(monkeypatch):
    """Trainings and evaluations as forks, which start at once; the list of their commands."""
    monkeypatch.setattr(process, "Popen", Fork)
    monkeypatch.setattr(Fork, "started", [])
    return Fork.started


def fit(data, out, *options):
    return main([str(data), "--out", str(out), "--device", "cpu", *options])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "framework"),
    [
        ("roboflow", "detectron2"),
        ("cvat", "mmdet"),
        ("label_studio", "detectron2"),
        ("yolo", "mmdet"),
        ("voc", "detectron2"),
        ("yolo_boxes", "mmdet"),
        ("label_maps", "mmseg"),
        ("label_maps", "detectron2"),
    ],
)
def test_from_a_folder_to_a_model(tmp_path, layout, framework, forks, capsys):
    data, out = tmp_path / layout, tmp_path / "out"
    fit_folders.LAYOUTS[layout](data)
    assert fit(data, out, "--framework", framework, "--epochs", "1") == 0, capsys.readouterr().err
    record = json.loads((out / "fit.json").read_text())
    assert record["trained"] and record["evaluated"]
    assert (out / "best.pth").is_file()
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--framework", "mmseg"], "--framework mmseg cannot train instances"),
        (["--out", "DATA/runs"], "--out must be outside of the data"),
        (["--seed", "-1"], "--seed must be 0 to 2147483647, got -1"),
        (["--weights", "DATA"], "--weights must be a file, got "),
        (["--out", os.fsdecode(b"\xff")], r"\udcff must be a path in UTF-8"),
        (["--batch", "0"], "--batch must be above 0, got 0"),
        (["--layer-decay", "0"], "--layer-decay must be a number in (0, 1], got 0.0"),
        (
            ["--backbone-factor", "nan"],
            "--backbone-factor must be a number of at least 0, and finite, got nan",
        ),
        (["--minutes", "1"], "--epochs and --minutes exclude each other"),
    ],
)
def test_refusals(tmp_path, options, sentence, capsys):
    data = tmp_path / "data"
    fit_folders.LAYOUTS["single_json"](data)
    options = [one.replace("DATA", str(data)) for one in options]
    assert fit(data, tmp_path / "out", "--epochs", "1", *options) == 2
    error = capsys.readouterr().err
    assert sentence in error.splitlines()[-1]
    # Nothing is fixed by a command that was refused.
    assert fit(data, tmp_path / "out", "--epochs", "1", "--dry-run") == 0, capsys.readouterr().err


def test_more_classes_than_label_maps_hold_are_refused(tmp_path, capsys):
    """The 255th class would be drawn as 255, which is no class."""
    data = tmp_path / "data"
    fit_folders.LAYOUTS["single_json"](data)
    (file,) = data.rglob("*.json")
    content = json.loads(file.read_text())
    content["categories"] += [{"id": 100 + n, "name": f"c{n}"} for n in range(253)]
    file.write_text(json.dumps(content))
    assert fit(data, tmp_path / "out", "--task", "semantic", "--dry-run") == 2
    assert "254 classes beside the background, got 255" in capsys.readouterr().err


def test_changed_labels_beside_a_named_yaml_are_refused(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "data/runs/first"
    fit_folders.LAYOUTS["yolo"](data)
    (yaml,) = data.glob("*.yaml")
    assert fit(yaml, out, "--dry-run", "--epochs", "1") == 0, capsys.readouterr().err
    assert fit(yaml, out, "--dry-run", "--epochs", "1") == 0, capsys.readouterr().err
    labels = min(path for path in data.rglob("*.txt") if path.stat().st_size)
    labels.write_text(labels.read_text().replace("0.", "0.0", 1))
    assert fit(yaml, out, "--dry-run", "--epochs", "1") == 2
    assert f"{yaml} has changed since" in capsys.readouterr().err


@pytest.mark.parametrize("framework", ["detectron2", "mmdet"])
def test_configs_hold_any_path(tmp_path, framework, capsys):
    data = tmp_path / "a b'#%[\"]\\,=ü\x7f\x85\u2028{{fileDirname}}{{ $HOME:x }}"
    fit_folders.LAYOUTS["single_json"](data)
    out = data.with_name(data.name + " out")
    assert fit(data, out, "--epochs", "1", "--dry-run", "--framework", framework) == 0
    if framework == "mmdet":
        config = pytest.importorskip("mmengine.config").Config.fromfile(str(out / "config.py"))
        found = config.work_dir, config.train_dataloader.dataset.ann_file
        assert config.test_evaluator.outfile_prefix == str(out / "results/results")
    else:
        config = pytest.importorskip("elsa_d2.config").load_config(str(out / "config.yaml"))
        found = config.OUTPUT_DIR, config.DATASETS.REGISTER_COCO[0][1]
    assert found == (str(out / "training"), str(out / "data/train.json"))
    title = FRAMEWORKS[framework].title
    model = f"Mask R-CNN with a small ELSA-Swin in {title}, on 6 images; classes: square, tall"
    assert model in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("framework", ["detectron2", "mmdet"])
def test_rates_of_the_backbone(tmp_path, framework):
    data, out = tmp_path / "data", tmp_path / "out"
    fit_folders.LAYOUTS["single_json"](data)
    factors = ["--layer-decay", "0.8", "--backbone-factor", "0.1"]
    options = ["--framework", framework, "--dry-run", "--epochs", "1"]
    assert fit(data, out, *factors, *options) == 0
    if framework == "mmdet":
        config = pytest.importorskip("mmengine.config").Config.fromfile(str(out / "config.py"))
        found = [config.optim_wrapper.paramwise_cfg[name] for name in NAMES]
    else:
        solver = pytest.importorskip("elsa_d2.config").load_config(str(out / "config.yaml")).SOLVER
        found = [solver.LAYER_DECAY, solver.BACKBONE_LR_FACTOR]
    assert found == [0.8, 0.1]


@pytest.mark.parametrize("framework", ["detectron2", "mmdet"])
def test_figures_go_to_the_trackers_that_are_named(tmp_path, framework):
    data, out = tmp_path / "data", tmp_path / "out"
    fit_folders.LAYOUTS["single_json"](data)
    options = ["--framework", framework, "--trackers", "wandb", "mlflow", "--dry-run"]
    assert fit(data, out, *options, "--epochs", "1") == 0
    if framework == "mmdet":
        config = pytest.importorskip("mmengine.config").Config.fromfile(str(out / "config.py"))
        kinds = [one.type.removesuffix("VisBackend") for one in config.visualizer.vis_backends]
        assert kinds == ["Local", "Tensorboard", "WandbTracker", "MLflowTracker"]
    else:
        config = pytest.importorskip("elsa_d2.config").load_config(str(out / "config.yaml"))
        assert config.LOG.WRITERS == ["tensorboard", "wandb", "mlflow"]


def test_lines_of_a_log_that_a_kill_has_cut_are_left_out(tmp_path):
    lines = ['{"iteration": 0, "total_loss": 2.0}', '{"iteration": 1, "to{"iteration": 1}', ""]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    assert FRAMEWORKS["detectron2"].history(tmp_path) == [{"iteration": 1, "loss": 2.0}]


def test_the_time_of_an_iteration_is_not_that_of_an_evaluated_image(tmp_path):
    folder = tmp_path / "20000101_000000/vis_data"
    folder.mkdir(parents=True)
    lines = [
        '{"loss": 2.0, "time": 0.25, "step": 10}',
        '{"coco/bbox_mAP": 0.5, "time": 0.06, "step": 10}',
    ]
    (folder / "scalars.json").write_text("\n".join([*lines, ""]))
    (row,) = FRAMEWORKS["mmdet"].history(tmp_path)
    assert row == {"iteration": 10, "loss": 2.0, "time": 0.25, "val/box AP": 50.0}


def test_another_run_in_the_same_folder_is_refused(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    fit_folders.LAYOUTS["single_json"](data)
    options = ["--dry-run", "--framework", "detectron2"]
    assert fit(data, out, *options, "--epochs", "2") == 0
    assert fit(data, out, *options, "--epochs", "3") == 2
    assert "is of a run with --epochs 2, got --epochs 3" in capsys.readouterr().err
    assert fit(data, out, *options) == 2
    assert "is of a run with --epochs 2, got no --epochs" in capsys.readouterr().err
    fit_folders.image(data / "new.jpg")
    assert fit(data, out, *options, "--epochs", "2") == 2
    assert f"{data} has changed since" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    assert fit(data, tmp_path / "mine", *options, "--epochs", "2") == 2
    assert "must be a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_damaged_data_set_is_one_sentence_and_no_training(tmp_path, forks, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    fit_folders.LAYOUTS["yolo"](data)
    (data / "images/train/a.jpg").write_bytes(b"no image")
    assert fit(data, out, "--epochs", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("elsa fit: ") and "a.jpg" in error
    assert not forks and {path.name for path in out.iterdir()} == {"fit.json"}


def test_without_a_framework(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    fit_folders.LAYOUTS["label_maps"](data)
    monkeypatch.setattr(frameworks, "is_missing", lambda name: True)
    assert fit(data, tmp_path / "out", "--epochs", "1") == 2
    assert "semantic needs Detectron2 or MMSegmentation, which is not" in capsys.readouterr().err
    monkeypatch.setattr(frameworks, "is_missing", lambda name: name == "detectron2")
    assert frameworks.choose_framework(None, "semantic").name == "mmseg"
    assert frameworks.choose_framework(None, "boxes").name == "mmdet"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "framework"),
    [("label_maps", "mmseg"), ("yolo", "mmdet"), ("label_maps", "detectron2")],
)
def test_minutes_are_filled_by_the_measured_speed(tmp_path, layout, framework, forks, capsys):
    """A dry run measures, writes the config, and trains nothing; the next one has its length."""
    data, out = tmp_path / layout, tmp_path / "out"
    fit_folders.LAYOUTS[layout](data)
    options = ["--framework", framework, "--minutes", "60"]
    assert fit(data, out, *options, "--dry-run") == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert len(forks) == 1 and not (out / "probe").exists() and not (out / "training").exists()
    timing = json.loads((out / "fit.json").read_text())["timing"]
    assert all(timing[name] > 0 for name in ("startup", "iteration", "image", "spent"))
    iterations = int(re.search(r"length: (\d+) iterations", printed)[1])
    assert 0.7 * 3600 < iterations * timing["iteration"] < 3600
    (config,) = out.glob("config.*")
    text = config.read_text()
    assert re.search(rf"\b(MAX_ITER: |max_iters=){iterations}\b", text), text
    assert fit(data, out, *options, "--dry-run") == 0 and len(forks) == 1
    config.write_text(text + "\n")
    assert fit(data, out, *options, "--dry-run") == 2
    assert "is not what elsa fit has written" in capsys.readouterr().err


def run(folder, out, *options, death=None):
    """Runs the command in a process, which may be killed; returns its exit status and output."""
    arguments = [str(folder), "--out", str(out), "--device", "cpu", *options]
    log = out.with_name("fit.log")
    log.unlink(missing_ok=True)
    (status,) = statuses_of([fork(run_fit, arguments, str(log), death=death)])
    return status, log.read_text()


@pytest.mark.slow
def test_goes_on_after_a_kill_at_any_step(tmp_path):
    """Finished steps are not repeated, and nothing is left half-written."""
    data, out = tmp_path / "data", tmp_path / "out"
    fit_folders.LAYOUTS["yolo"](data)
    options = ["--framework", "detectron2", "--epochs", "20"]
    started = ("fit_forks.start", "*", 1)
    killed = -signal.SIGKILL
    moments = {
        "preparing": ("open", "*val.json.*.part", 1),
        "before the config": ("open", "*config.yaml.*.part", 1),
        "before the training": started,
        "training": TRAINING,
        "before the evaluation": ("fit_forks.start", "*", 2),
        "reporting": ("open", "*report.html.*.part", 1),
    }
    for moment, death in moments.items():
        status, log = run(data, out, *options, death=(signal.SIGKILL, death))
        assert status == killed, (moment, log)
        assert not (out / "report.html").exists()
    lines = (out / "log.txt").read_text()
    begins = [int(one) for one in re.findall(r"Starting training from iteration (\d+)", lines)]
    assert begins[0] == 0 and len(begins) == 2 and 0 < begins[1] <= 40, begins
    status, log = run(data, out, *options, death=(signal.SIGKILL, started))
    assert status == 0, log  # starts nothing
    assert (out / "report.html").is_file() and not list(out.rglob("*.part"))
    report = (out / "report.html").read_bytes()
    assert run(data, out, *options, death=(signal.SIGKILL, started))[0] == 0
    assert (out / "report.html").read_bytes() == report


@pytest.mark.slow
def test_a_stopped_training_goes_on(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    fit_folders.LAYOUTS["yolo_boxes"](data)
    options = ["--framework", "mmdet", "--epochs", "20"]
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        found, log = run(data, out, *options, death=(number, TRAINING))
        assert found == status, log
        assert log.endswith("; the same command goes on from here\n")
        assert (out / "training/last_checkpoint").is_file()
    status, log = run(data, out, *options)
    assert status == 0 and "best.pth" in (out / "report.html").read_text(), log
