"""tools/train_net.py: training, evaluation, interruption, several processes, refusals."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("detectron2")

from conftest import load_tool
from d2_tiny import (
    CONFIG,
    TOOL,
    VOLO_CONFIG,
    arguments_of,
    datasets,
    overrides,
    read_metrics,
    run_in_process,
)
from killing import PATIENCE, fork
from killing_d2 import run_tool


@pytest.fixture(scope="module")
def tool():
    return load_tool("train_net")


def train(folder, arguments):
    """Runs a training that must succeed in a process of its own; returns what it printed."""
    process = fork(run_tool, folder, arguments)
    try:
        process.join(PATIENCE)
        status = process.exitcode
    finally:
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
    log = (folder / "log.txt").read_text()
    assert status == 0, log
    return log


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A finished run, started from a folder that is not the repository's."""
    folder = tmp_path_factory.mktemp("run")
    log = train(folder, arguments_of(digits, OUTPUT_DIR="out"))
    return folder / "out", log


@pytest.mark.slow
def test_training_ends_with_an_evaluation_in_the_metrics(trained):
    output, log = trained
    *training, evaluation = read_metrics(output)
    assert training[-1]["iteration"] == 3
    assert math.isfinite(training[-1]["total_loss"])
    assert evaluation["iteration"] == 4
    for key in ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"):
        assert 0 <= evaluation[key] <= 100
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert "no CUDA device found: MODEL.DEVICE is cpu instead of cuda" in log


@pytest.mark.slow
@pytest.mark.parametrize("ids", ["as trained", "turned round"])
def test_evaluation_alone_gives_the_same_numbers(trained, digits, tool, tmp_path, ids):
    output, _ = trained
    flags = ["--eval-only", "--config-file", str(output / "config.yaml")]
    data = datasets(digits)
    if ids == "turned round":  # the numbers of another export, without the training part
        file = tmp_path / "validation.json"
        coco = json.loads((digits / "annotations/instances_validation.json").read_text())
        for one in coco["annotations"]:
            one["category_id"] = 11 - one["category_id"]
        for one in coco["categories"]:
            one["id"] = 11 - one["id"]
        file.write_text(json.dumps(coco))
        data = [["turned_round", str(file), data[1][2]]]
    keys = overrides(
        digits,
        OUTPUT_DIR=str(tmp_path),
        MODEL__WEIGHTS=str(output / "model_final.pth"),
        MODEL__DEVICE="cpu",
        DATASETS__REGISTER_COCO=data,
        DATASETS__TEST=[data[-1][0]],
    )
    results = run_in_process(tool, [*flags, *keys])
    metrics = read_metrics(output)[-1]
    for task in ("bbox", "segm"):
        for name, value in results[task].items():  # of each class, too
            assert value == pytest.approx(metrics[f"{task}/{name}"], nan_ok=True)
    places = [folder / "inference/coco_instances_results.json" for folder in (output, tmp_path)]
    before, after = [[one["category_id"] for one in json.loads(p.read_text())] for p in places]
    assert after == [11 - one if ids == "turned round" else one for one in before]
    assert len(set(after)) > 1


def test_a_training_goes_on_with_its_own_classes_alone(trained, digits, tool, capfd, tmp_path):
    output, _ = trained
    checkpoint = torch.load(output / "model_final.pth")
    classes = checkpoint["meta"]["dataset_meta"]["classes"]
    assert classes == list("0123456789")
    classes.reverse()
    torch.save(checkpoint, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    keys = overrides(digits, OUTPUT_DIR=str(tmp_path))
    assert tool.main(["--resume", "--config-file", CONFIG, *keys]) == 2
    expected = "class 0 is '9' in the last checkpoint and '0' in the training data"
    assert expected in capfd.readouterr().err


def misfits(state):
    """What is wrong -> changed weights, and the sentence about it."""
    head = "roi_heads.box_head.fc1.weight"
    rows = {key: value[:9] for key, value in state.items() if "cls_score" in key}
    less = {key: value for key, value in state.items() if "mask_head" not in key}
    wider = {**state, head: torch.zeros(16, 7)}
    return {
        "classes": ({**state, **rows}, "it has 8 classes, but MODEL.ROI_HEADS.NUM_CLASSES is 10"),
        "shape": (wider, f"another backbone: {head} has the shape (16, 7) instead of"),
        "lacking": (less, "parameters, roi_heads.mask_head"),
        "damaged": (None, "is cut off"),
    }


def test_a_training_from_weights_that_match_nothing_is_refused(
    trained, digits, tool, capfd, tmp_path
):
    state = torch.load(trained[0] / "model_final.pth")["model"]
    file = tmp_path / "weights.pth"
    torch.save({"model": {key: value for key, value in state.items() if "roi" in key}}, file)
    keys = overrides(digits, OUTPUT_DIR=str(tmp_path / "out"), MODEL__WEIGHTS=str(file))
    assert tool.main(["--config-file", CONFIG, *keys]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"train_net: {file} cannot be converted: it holds no ELSA-Swin")
    assert not list((tmp_path / "out").glob("*.pth"))


@pytest.mark.parametrize("case", ["classes", "shape", "lacking", "damaged"])
@pytest.mark.parametrize("resume", [False, True], ids=["weights", "resume"])
def test_an_evaluation_of_weights_that_do_not_fit_is_refused(
    trained, digits, tool, capfd, tmp_path, case, resume
):
    output, _ = trained
    weights, sentence = misfits(torch.load(output / "model_final.pth")["model"])[case]
    file = tmp_path / "weights.pth"
    if weights is None:
        file.write_bytes((output / "model_final.pth").read_bytes()[:5000])
    else:
        torch.save({"model": weights}, file)
    keys = overrides(digits, OUTPUT_DIR=str(tmp_path), MODEL__WEIGHTS=str(file))
    flags = ["--eval-only"]
    if resume:
        (tmp_path / "last_checkpoint").write_text("weights.pth")
        flags.append("--resume")
    assert tool.main([*flags, "--config-file", CONFIG, *keys]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("train_net: ") and sentence in line and str(file) in line


@pytest.mark.slow
def test_test_time_augmentation(trained, digits, tool, tmp_path):
    output, _ = trained
    keys = overrides(
        digits,
        OUTPUT_DIR=str(tmp_path),
        MODEL__WEIGHTS=str(output / "model_final.pth"),
        MODEL__DEVICE="cpu",
        TEST__AUG__ENABLED=True,
        TEST__AUG__MIN_SIZES=[96],
        TEST__AUG__FLIP=False,
    )
    results = run_in_process(tool, ["--eval-only", "--config-file", CONFIG, *keys])
    assert set(results) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    # At the test size and without mirroring, the augmented model is the plain one.
    for task in ("bbox", "segm"):
        assert results[f"{task}_TTA"] == pytest.approx(results[task], nan_ok=True, abs=0.5)
    for folder in ("inference", "inference_TTA"):
        assert json.loads((tmp_path / folder / "coco_instances_results.json").read_text())


@pytest.mark.slow
def test_resuming_a_finished_run_evaluates_it_again(trained, digits, tool, capsys):
    output, _ = trained
    before = read_metrics(output)
    keys = overrides(digits, OUTPUT_DIR=str(output), MODEL__DEVICE="cpu")
    assert tool.main(["--config-file", CONFIG, "--resume", *keys]) == 0
    after = read_metrics(output)
    assert after[: len(before)] == before
    assert after[-1]["bbox/AP"] == pytest.approx(before[-1]["bbox/AP"])


@pytest.mark.slow
def test_resuming_without_a_checkpoint_says_so(digits, tmp_path, tool, capsys):
    keys = overrides(digits, OUTPUT_DIR=str(tmp_path), SOLVER__MAX_ITER=1, MODEL__DEVICE="cpu")
    assert tool.main(["--config-file", CONFIG, "--resume", *keys]) == 0
    log = (tmp_path / "log.txt").read_text()
    assert f"{tmp_path} has no checkpoint to resume from" in log
    assert "training starts at iteration 0 from random weights" in log


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ELSA_SWIN", "ELSA_VOLO"])
def test_two_processes_train_and_evaluate(digits, tmp_path, family):
    flags = ["--num-gpus", "2", "--dist-url", "auto"]
    flags += ["--config-file", VOLO_CONFIG] * (family == "ELSA_VOLO")  # the last one counts
    changes = {"OUTPUT_DIR": "out", "SOLVER__MAX_ITER": 2, "TEST__BEST_METRIC": "ema/bbox/AP"}
    changes["MODEL__EMA__ENABLED"] = True
    # Without the last output: parameters that get no gradients would end the second iteration.
    changes |= {f"MODEL__{family}__OUT_FEATURES": ["res2", "res3", "res4"]}
    changes |= {"MODEL__FPN__IN_FEATURES": ["res2", "res3", "res4"]}
    changes |= {"MODEL__RPN__IN_FEATURES": ["p2", "p3", "p4", "p5"]}
    changes |= {"MODEL__ANCHOR_GENERATOR__SIZES": [[32], [64], [128], [256]]}
    train(tmp_path, arguments_of(digits, *flags, **changes))
    output = tmp_path / "out"
    for name, rank in (("log.txt", 0), ("log.txt.rank1", 1)):
        log = (output / name).read_text()
        assert f"Rank of current process: {rank}. World size: 2" in log
        assert "Making batched data loader with batch_size=1" in log
        # 8 validation images, half for each.
        assert "Start inference on 4 batches" in log
    metrics = read_metrics(output)[-1]
    assert 0 <= metrics["bbox/AP"] <= 100 and 0 <= metrics["ema/bbox/AP"] <= 100
    assert (output / "model_best.pth").exists()
    predictions = json.loads((output / "inference/coco_instances_results.json").read_text())
    assert {prediction["image_id"] for prediction in predictions} == set(range(1, 9))


@pytest.mark.slow
def test_exit_status_and_output_of_the_command(digits, tmp_path):
    arguments = arguments_of(digits, "--eval-only", OUTPUT_DIR="out")
    result = subprocess.run(
        [sys.executable, TOOL, *arguments],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 2
    assert result.stdout.startswith("train_net: an evaluation needs weights")
    assert result.stdout.count("\n") == 1


def test_help_names_the_arguments_of_detectron2(tool, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--num-gpus", "--num-machines", "--resume", "--eval-only", "--dist-url", "gloo"):
        assert flag in text
