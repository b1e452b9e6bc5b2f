"""Trainings of seconds through the command lines: ours, MMDetection's and MMSegmentation's."""

import itertools
import json
import math
import pickle
import re
import signal
from importlib.util import find_spec
from pathlib import Path

import cv2
import pytest
import torch
from killing import fork, statuses_of, two_ranks
from killing_mm import run_tool, run_tool_noting_reads, run_tool_to_its_end
from mm_tiny import CONFIGS, REPOSITORY, options

from elsa_mm.history import from_plain

frameworks = pytest.mark.parametrize("framework", CONFIGS)
METRICS = {"mmdet": ["coco/bbox_mAP", "coco/segm_mAP"], "mmseg": ["mIoU", "aAcc"]}
LOGS = itertools.count()


def run(tool, *arguments, cwd, target=run_tool, environments=({},)):
    """Runs a tool that must succeed, once or in several processes; returns what it printed."""
    log = Path(cwd, f"output{next(LOGS)}.txt")
    processes = [fork(target, tool, arguments, cwd, log, each) for each in environments]
    assert statuses_of(processes) == [0] * len(processes), log.read_text()[-4000:]
    return log.read_text()


def iterations(output):
    """Numbers of the training iterations in a log."""
    return [int(number) for number in re.findall(r"Iter\(train\) *\[ *(\d+)/", output)]


def last_metrics(output, framework):
    return {name: float(re.findall(rf" {name}: (\S+)", output)[-1]) for name in METRICS[framework]}


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A training that is killed after its second checkpoint, before `last_checkpoint` names that,
    and resumed; one for each framework."""
    done = {}

    def train(framework):
        if framework not in done:
            done[framework] = kill_and_resume(framework, digits, tmp_path_factory.mktemp(framework))
        return done[framework]

    return train


def kill_and_resume(framework, digits, folder):
    tool, more = REPOSITORY / "tools/train.py", {"train_cfg__val_interval": 1000}
    values = options(framework, digits, default_hooks__checkpoint__interval=2, **more)
    arguments = [CONFIGS[framework], "--work-dir", "runs", "--resume", *values]
    output = folder / "killed.txt"
    death = signal.SIGKILL, ("os.rename", "*last_checkpoint.*.part", 2)
    process = fork(run_tool, tool, arguments, folder, output, death=death)
    assert statuses_of([process]) == [-signal.SIGKILL], output.read_text()[-4000:]
    checkpoint = (folder / "runs/last_checkpoint").read_text()
    number = int(re.search(r"iter_(\d+)\.pth$", checkpoint)[1])
    assert number == 2 and (folder / "runs/iter_4.pth").is_file()
    resumed = run(tool, *arguments, f"train_cfg.max_iters={number + 3}", cwd=folder)
    return folder, number, output.read_text(), resumed


@pytest.mark.slow
@frameworks
def test_killed_training_goes_on_from_its_checkpoint(trained, framework):
    _, number, killed, resumed = trained(framework)
    assert "--resume: no checkpoint in runs, training starts from the beginning" in killed
    assert iterations(killed)[:2] == [1, 2]
    assert f"resumed epoch: 0, iter: {number}" in resumed
    assert iterations(resumed) == [number + 1, number + 2, number + 3]
    assert "no checkpoint in" not in resumed


@frameworks
def test_checkpoints_hold_nothing_but_tensors_and_plain_data(trained, framework):
    """MMEngine 0.10.7 leaves it to `torch.load` to refuse anything else, and resumes from them."""
    folder, number, *_ = trained(framework)
    for path in folder.glob("runs/iter_*.pth"):
        hub = torch.load(path, weights_only=True)["message_hub"]
        losses, counts = from_plain(hub)["log_scalars"]["train/loss"].data
        assert len(losses) == len(counts) == torch.load(path, weights_only=True)["meta"]["iter"]
        assert all(map(math.isfinite, losses)) and set(counts) == {1}


@frameworks
def test_resumed_training_has_the_state_of_the_killed_one(trained, framework):
    folder, number, _, _ = trained(framework)
    last = torch.load(folder / f"runs/iter_{number + 3}.pth", weights_only=False)
    assert last["meta"]["iter"] == number + 3
    assert {int(state["step"]) for state in last["optimizer"]["state"].values()} == {number + 3}
    assert {scheduler["_global_step"] for scheduler in last["param_schedulers"]} == {number + 3}
    assert not list((folder / "runs").glob("*.part"))


@pytest.mark.slow
@frameworks
def test_training_evaluates_and_the_test_tool_agrees(trained, framework, digits):
    folder, number, _, resumed = trained(framework)
    arguments = [CONFIGS[framework], f"runs/iter_{number + 3}.pth", "--work-dir", "evaluated"]
    out = {"mmdet": "predictions.pkl", "mmseg": "predictions"}[framework]
    arguments += ["--out", out, "--show-dir", "painted"]
    arguments += [] if framework == "mmdet" else ["--tta"]
    tool = REPOSITORY / "tools/test.py"
    output = run(tool, *arguments, *options(framework, digits), cwd=folder)
    metrics = last_metrics(output, framework)
    (saved,) = (folder / "evaluated").glob("*/2*.json")
    assert metrics == pytest.approx(
        {name: json.loads(saved.read_text())[name] for name in metrics}, abs=1e-3
    )
    assert all(math.isfinite(value) for value in last_metrics(resumed, framework).values())
    if framework == "mmdet":
        assert metrics == last_metrics(resumed, framework)
        predictions = pickle.loads((folder / out).read_bytes())
        assert [sample["img_id"] for sample in predictions] == [1, 2, 3, 4]
        assert all(len(sample["pred_instances"]["masks"]) for sample in predictions)
        painted = list((folder / "evaluated").glob("*/painted/*.jpg"))
    else:
        predictions = sorted((folder / out).glob("*.png"))
        assert [path.stem for path in predictions] == [f"{i:06d}" for i in range(1, 5)]
        labels = cv2.imread(str(predictions[0]), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (96, 96) and labels.min() >= 1 and labels.max() <= 11
        painted = list((folder / "painted").rglob("*.png"))
    assert len(painted) == 4


@pytest.mark.slow
@frameworks
def test_the_frameworks_own_tool_runs_the_config(digits, tmp_path, framework):
    tool = Path(find_spec(framework).origin).parent / ".mim/tools/train.py"
    values = options(framework, digits, train_cfg__max_iters=2)
    output = run(tool, CONFIGS[framework], "--work-dir", "runs", *values, cwd=tmp_path)
    assert iterations(output) == [1, 2]
    assert (tmp_path / "runs/last_checkpoint").read_text().endswith("iter_2.pth")
    assert set(last_metrics(output, framework)) == set(METRICS[framework])


@pytest.mark.slow
@frameworks
def test_two_processes_in_mixed_precision(digits, tmp_path, framework):
    values = options(framework, digits, train_cfg__max_iters=2)
    arguments = [CONFIGS[framework], "--launcher", "pytorch", "--amp", "--work-dir", "runs"]
    processes = dict(target=run_tool_to_its_end, environments=two_ranks())
    output = run(REPOSITORY / "tools/train.py", *arguments, *values, cwd=tmp_path, **processes)
    assert "no GPU: the processes communicate through gloo" in output
    assert "no GPU: mixed precision is bfloat16" in output
    assert ("no GPU: BatchNorm instead of SyncBN" in output) == (framework == "mmseg")
    assert "GPU number: 2" in output
    assert iterations(output) == [1, 2]
    assert set(last_metrics(output, framework)) == set(METRICS[framework])
    state = torch.load(tmp_path / "runs/iter_2.pth", weights_only=False)
    assert not [name for name in state["state_dict"] if name.startswith("module.")]


@pytest.mark.slow
@pytest.mark.parametrize("nodes, readers", [(1, {"0"}), (2, {"0", "1"})])
def test_the_first_process_of_a_node_checks_the_data_for_all(digits, tmp_path, nodes, readers):
    content = json.loads((digits / "annotations/instances_training.json").read_text())
    content["images"].append({**content["images"][0], "id": 99, "file_name": "gone.jpg"})
    file = tmp_path / "training.json"
    file.write_text(json.dumps(content))
    values = options("mmdet", digits, train_dataloader__dataset__ann_file=file)
    arguments = [CONFIGS["mmdet"], "--launcher", "pytorch", "--work-dir", "runs", *values]
    tool, log = REPOSITORY / "tools/train.py", tmp_path / "log.txt"
    processes = [
        fork(run_tool_noting_reads, str(file), tool, arguments, tmp_path, log, environment)
        for environment in two_ranks(nodes)
    ]
    assert statuses_of(processes) == [2, 2], log.read_text()[-3000:]
    assert log.read_text().count("lacks 1 of the 17 images") == 1
    assert "Traceback" not in log.read_text()
    assert set((tmp_path / "reads.txt").read_text()) == readers
