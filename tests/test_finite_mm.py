"""An OpenMMLab training with NaN in its losses ends, and keeps NaN out of its checkpoints."""

import math
import re
from pathlib import Path

import pytest
import torch
from mm_tiny import CONFIGS, options
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from elsa_mm import cli
from elsa_mm.checkpoint import find_last_checkpoint


@HOOKS.register_module(force=True)
class SpoilHook(Hook):
    """NaN in the outputs of a part at some iterations, counted from 1."""

    def __init__(self, part, first, last=99):
        self.part, self.first, self.last = part, first, last

    def before_train(self, runner):
        def spoil(module, inputs, output):
            if module.training and self.first <= runner.iter + 1 <= self.last:
                return nan_like(output)

        runner.model.get_submodule(self.part).register_forward_hook(spoil)


def nan_like(value):
    if isinstance(value, torch.Tensor):
        return value * math.nan
    return type(value)(nan_like(one) for one in value)


PARTS = {
    "mmdet": "neck=dict(in_channels=[8, 16, 32, 64])",
    "mmseg": "decode_head=dict(in_channels=[8, 16, 32, 64], channels=8), "
    "auxiliary_head=dict(in_channels=32, channels=8)",
}


def train(framework, digits, spoil, *flags, **more):
    Path("config.py").write_text(
        f"_base_ = [{str(CONFIGS[framework])!r}]\n"
        f"custom_hooks = [dict(type='SpoilHook', **{spoil!r})]\n"
        "train_cfg = dict(max_iters=30, val_interval=100)\n"
        "checkpoint = dict(interval=2, max_nonfinite=2, max_keep_ckpts=1)\n"
        "backbone = dict(arch=dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]))\n"
        f"model = dict(backbone=backbone, {PARTS[framework]})\n"
        "default_hooks = dict(checkpoint=checkpoint)\n"
    )
    arguments = ["config.py", "--work-dir", "out", *flags]
    return cli.train([*arguments, *options(framework, digits, **more)])


@pytest.mark.parametrize(
    "framework, part, flags",
    [
        ("mmdet", "backbone", []),
        ("mmdet", "rpn_head.rpn_reg", ["--amp"]),
        ("mmseg", "decode_head.conv_seg", ["--amp"]),
    ],
)
def test_nan_ends_a_training_in_one_sentence(
    framework, part, flags, digits, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    assert train(framework, digits, dict(part=part, first=4), *flags) == 1
    log = capfd.readouterr().err
    last = tmp_path / "out/iter_2.pth"
    assert "Traceback" not in log
    assert re.search(
        rf"^train: training ended at iteration 5 after 2 iterations in a row with losses that are "
        rf"not finite \(loss\S* is nan.*\); the last good checkpoint is {last}$",
        log,
        re.MULTILINE,
    ), log[-2000:]
    assert find_last_checkpoint("out") == Path("out/iter_2.pth")
    assert [path.name for path in Path("out").glob("*.pth")] == ["iter_2.pth"]
    state = torch.load(last, weights_only=False)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
