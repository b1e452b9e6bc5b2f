"""An OpenMMLab training with NaN in its losses ends, and keeps NaN out of its checkpoints."""

import os
import re
from pathlib import Path

import killing_mm
import pytest
import spoil_mm  # noqa: F401
import torch
from killing import fork, statuses_of, two_ranks
from mm_tiny import CONFIGS, REPOSITORY, options
from mmengine.config import Config
from mmengine.runner import Runner

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.preemption import TrainingEnded
from elsa_mm import cli
from elsa_mm.checkpoint import find_last_checkpoint
from examples.digits.imagenet_layout import write_layout

pytestmark = pytest.mark.slow

PARTS = {
    "mmdet": "neck=dict(in_channels=[8, 16, 32, 64])",
    "mmpretrain": "head=dict(in_channels=64)",
    "mmseg": "decode_head=dict(in_channels=[8, 16, 32, 64], channels=8), "
    "auxiliary_head=dict(in_channels=32, channels=8)",
}
CLASSIFIER = REPOSITORY / "configs/mmpretrain/digits/elsa-swin_digits.py"


def write_config(framework, spoil):
    Path("config.py").write_text(
        f"_base_ = [{str(CONFIGS.get(framework, CLASSIFIER))!r}]\n"
        f"custom_hooks = [dict(type='SpoilHook', **{spoil!r})]\n"
        "train_cfg = dict(max_iters=30, val_interval=100)\n"
        "checkpoint = dict(interval=2, max_nonfinite=2, max_keep_ckpts=1)\n"
        "backbone = dict(arch=dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]))\n"
        f"model = dict(backbone=backbone, {PARTS[framework]})\n"
        "default_hooks = dict(checkpoint=checkpoint)\n"
    )


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory):
    """The digits in ImageNet's layout."""
    root = tmp_path_factory.mktemp("folders")
    write_layout(digits, root, progress=False)
    return root


def train(framework, digits, spoil, *flags, **more):
    write_config(framework, spoil)
    arguments = ["config.py", "--work-dir", "out", *flags]
    return cli.train([*arguments, *options(framework, digits, **more)])


def of_mmdetections_own_tool(digits, **more):
    """The runner that MMDetection's tools/train.py builds from a config."""
    write_config("mmdet", dict(part="backbone", first=4))
    cfg = Config.fromfile("config.py")
    values = options("mmdet", str(digits), **more)[1:]
    cfg.merge_from_dict(dict(value.split("=", 1) for value in values))
    for part in ("train", "val", "test"):
        loader = cfg[f"{part}_dataloader"]
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.pop("indices", None)
    cfg.default_hooks.logger.interval = 1
    cfg.work_dir = "out"
    return Runner.from_cfg(cfg)


@pytest.mark.parametrize(
    "framework, part, flags",
    [
        ("mmdet", "backbone", []),
        ("mmdet", "rpn_head.rpn_reg", ["--amp"]),
        ("mmseg", "decode_head.conv_seg", ["--amp"]),
        ("mmpretrain", "head", []),
    ],
)
def test_nan_ends_a_training_in_one_sentence(
    framework, part, flags, digits, folders, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    data = folders if framework == "mmpretrain" else digits
    assert train(framework, data, dict(part=part, first=4), *flags) == 1
    log = capfd.readouterr().err
    last = tmp_path / "out/iter_2.pth"
    assert "Traceback" not in log
    assert re.search(
        rf"^train: training ended at iteration 5 after 2 iterations in a row with losses that are "
        rf"not finite \(loss\S* is nan.*\); the last finite checkpoint is {last}$",
        log,
        re.MULTILINE,
    ), log[-2000:]
    assert find_last_checkpoint("out") == Path("out/iter_2.pth")
    assert [path.name for path in Path("out").glob("*.pth")] == ["iter_2.pth"]
    state = torch.load(last, weights_only=False)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_nan_ends_a_training_of_mmdetections_own_tool(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingEnded) as end:
        of_mmdetections_own_tool(digits).train()
    assert end.value.code == 1 and find_last_checkpoint("out") == Path("out/iter_2.pth")
    assert end.value.sentence.startswith("training ended at iteration 5 after 2 iterations in a ")
    last = tmp_path / "out/iter_2.pth"
    assert end.value.sentence.endswith(f"the last finite checkpoint is {last}")


def test_mmdetections_own_tool_refuses_what_matches_nothing(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"conv1.weight": torch.zeros(2)}}, "resnet.pth")
    with pytest.raises(UsageError, match="the checkpoint resnet.pth does not match the model"):
        of_mmdetections_own_tool(digits, load_from="resnet.pth").train()


def test_nan_in_one_of_two_processes_ends_both(digits, tmp_path):
    os.symlink(digits, tmp_path / "data")
    (folder := tmp_path / "run").mkdir()
    config = (
        "custom_imports = dict(imports=['elsa_mm', 'spoil_mm'])\n"
        "train_cfg = dict(max_iters=30, val_interval=100)\n"
        "default_hooks['checkpoint'].update(interval=2, max_nonfinite=2)\n"
        "custom_hooks = [dict(type='SpoilHook', part='decode_head.conv_seg', first=4, rank=1)]\n"
    )
    processes = [
        fork(killing_mm.train_with, str(folder), each, ["--launcher", "pytorch"], config)
        for each in two_ranks()
    ]
    statuses, log = statuses_of(processes), (folder / "log.txt").read_text()
    assert statuses == [1, 1], log[-3000:]
    assert log.count("train: training ended at iteration 5 after 2 iterations in a row") == 1
    assert f"; the last finite checkpoint is {folder.resolve()}/out/iter_2.pth\n" in log
    assert "Traceback" not in log
    assert [path.name for path in (folder / "out").glob("*.pth")] == ["iter_2.pth"]
