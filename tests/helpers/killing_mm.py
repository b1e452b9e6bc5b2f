"""OpenMMLab runs in processes of their own: the tools, and the training of test_killed.py.

The frameworks are imported, elsa_mm is not: that is for the tool or its config to do.
"""

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

import mmdet.apis  # noqa: F401
import mmseg.apis  # noqa: F401
import torch
from killing import fill_disk, note_loss, run_in
from mm_tiny import CONFIGS
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from quick_mmengine import quicken_mmengine

import elsa_core  # noqa: F401

quicken_mmengine()

CONFIG = """
_base_ = {bases!r}
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(48, 48), ratio_range=(0.7, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(32, 32)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=2, dataset=dict(data_root={data!r}, pipeline=pipeline))
val_dataloader = dict(dataset=dict(data_root={data!r}))
arch = dict(embed_dim=16, num_heads=[1, 1, 2, 2])
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=dict(arch=arch, drop_path_rate=0.2),
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=8),
    auxiliary_head=dict(in_channels=64, channels=8),
)
train_cfg = dict(max_iters=100000, val_interval=100000)
default_hooks = dict(checkpoint=dict(interval=4))
default_hooks["logger"] = dict(interval=1)
custom_hooks = [dict(type="NoteLoss", priority="VERY_HIGH")]
"""

# The same counted in epochs of 8 iterations, with a checkpoint after each.
EPOCHS = """
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=10000, val_interval=10000)
train_dataloader["sampler"] = dict(type="DefaultSampler", shuffle=True)
default_hooks["checkpoint"].update(by_epoch=True, interval=1)
default_hooks["logger"] = dict(log_metric_by_epoch=True)
log_processor = dict(by_epoch=True)
"""


def config_text(folder, more="", bases=()):
    """Of the training on the data in ``data`` beside ``folder``."""
    data = str(Path(folder).parent / "data")
    return CONFIG.format(bases=[str(CONFIGS["mmseg"]), *bases], data=data) + more


def train(folder, resume, more=""):
    """Exits as tools/train.py does."""
    train_with(folder, {}, ["--resume"] if resume else [], more)


def train_epochs(folder, resume):
    train(folder, resume, EPOCHS)


def evaluate(folder, checkpoint):
    from elsa_mm import cli

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    run_in(folder)
    data = f"test_dataloader.dataset.data_root={Path(folder).parent / 'data'}"
    sys.exit(cli.test(["config.py", checkpoint, "--work-dir", "out", "--cfg-options", data]))


FIRST = 1  # number of a checkpoint after one iteration
FULL_DISK = (
    r"^train: the checkpoint /.*/out/iter_(\d+)\.pth cannot be written: {reason}; "
    r"--resume continues from /.*/out/{last}$"
)


def last_checkpoint(output):
    from elsa_mm.checkpoint import find_last_checkpoint

    return find_last_checkpoint(output)


def last_iteration(output):
    """Iterations of the last checkpoint, which must be whole."""
    if not (last := last_checkpoint(output)):
        return 0
    state = torch.load(last, weights_only=False)
    iteration = state["meta"]["iter"]
    assert {int(one["step"]) for one in state["optimizer"]["state"].values()} == {iteration}
    assert {scheduler["_global_step"] for scheduler in state["param_schedulers"]} == {iteration}
    return iteration


def train_on_full_disk(folder, size):
    """No file can have more than so many bytes."""
    fill_disk(size)
    train(folder, True)


def train_with(folder, environment, arguments, more, bases=()):
    from elsa_mm import cli

    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    run_in(folder)
    # Each process its own: one may read while another writes.
    name = f"config{os.environ.get('RANK', '')}.py"
    Path(name).write_text(config_text(folder, more, bases))
    sys.exit(cli.train([name, "--work-dir", "out", *arguments]))


def run_tool(tool, arguments, folder, log="log.txt", environment=None):
    """Does in a folder what ``python tool *arguments`` does."""
    assert "elsa_mm" not in sys.modules
    os.environ.update(environment or {}, CUDA_VISIBLE_DEVICES="")
    run_in(folder, log)
    sys.argv = [str(tool), *map(str, arguments)]
    runpy.run_path(str(tool), run_name="__main__")


def run_tool_to_its_end(*arguments):
    """The same, and the interpreter ends as any does, where a fork would leave out most of it."""
    try:
        run_tool(*arguments)
    except SystemExit as end:
        ctypes.pythonapi.Py_Exit(end.code)


def run_tool_noting_reads(file, *arguments):
    """The same; each process writes its rank into `reads.txt` where it opens the file."""

    def look(event, values):
        if event == "open" and str(values[0]) == file:
            descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, os.environ["RANK"].encode())

    notes = os.path.join(arguments[2], "reads.txt")
    sys.addaudithook(look)
    run_tool(*arguments)


class NoteLoss(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        note_loss(runner.iter + 1, outputs["loss"].item())
        if os.environ.get("STOP_AT") == str(runner.iter + 1):
            os.kill(os.getpid(), signal.SIGTERM)


HOOKS.register_module(module=NoteLoss, force=True)
