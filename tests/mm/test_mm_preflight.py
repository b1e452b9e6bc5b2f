"""Models, data and checkpoints that do not fit each other: one sentence, before the run begins."""

import json
from types import SimpleNamespace

import pytest
import torch
from mm_tiny import CONFIGS, options
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner import EpochBasedTrainLoop
from mmseg.models import SegTTAModel
from torch import nn
from torch.utils.data import DataLoader

from elsa_core.runtime.errors import UsageError
from elsa_mm import preflight
from elsa_mm.loading import check_weights


@pytest.mark.parametrize(
    "framework, head, classes",
    [("mmdet", "roi_head.bbox_head", 10), ("mmseg", "decode_head", 11)],
)
def test_classes_of_model_and_data(refusal, digits, framework, head, classes):
    more = {f"model__{head.replace('.', '__')}__num_classes": 7}
    if framework == "mmseg":  # its losses have a weight for each class
        more["model__decode_head__loss_decode__class_weight"] = None
    sentence = refusal("train", CONFIGS[framework], *options(framework, digits, **more))
    assert (
        sentence
        == f"model.{head}.num_classes must be the {classes} classes of the train data, got 7"
    )


def test_annotation_file_without_some_of_the_classes(refusal, digits, tmp_path):
    content = json.loads((digits / "annotations/instances_training.json").read_text())
    (gone,) = (c["id"] for c in content["categories"] if c["name"] == "3")
    content["categories"] = [c for c in content["categories"] if c["id"] != gone]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != gone]
    (tmp_path / "part.json").write_text(json.dumps(content))
    more = {"train_dataloader__dataset__ann_file": tmp_path / "part.json"}
    sentence = refusal("train", CONFIGS["mmdet"], *options("mmdet", digits, **more))
    assert sentence.startswith(
        f"annotation file {tmp_path / 'part.json'}: no category is called '3'"
    )


@pytest.mark.parametrize("tool", ["test", "train"])
def test_checkpoint_of_another_number_of_classes(refusal, digits, checkpoint, tool):
    more = {
        f"model__{head}__{key}": value
        for head in ("decode_head", "auxiliary_head")
        for key, value in (("num_classes", 7), ("loss_decode__class_weight", None))
    }
    path = checkpoint("mmseg")
    arguments = [path] if tool == "test" else ["--resume", path]
    assert refusal(tool, CONFIGS["mmseg"], *arguments, *options("mmseg", digits, **more)) == (
        f"the checkpoint {path} does not match the model, is it of another number of classes or "
        "another backbone: decode_head.conv_seg.weight has the shape (11, 48, 1, 1) instead of "
        "(7, 48, 1, 1)"
    )


def test_checkpoint_of_another_model(refusal, digits, checkpoint):
    path = checkpoint("mmseg")
    sentence = refusal("test", CONFIGS["mmdet"], path, *options("mmdet", digits))
    assert sentence.startswith(f"the checkpoint {path} does not match the model: it lacks ")
    assert sentence.endswith(" parameters, neck.lateral_convs.0.conv.weight for one")


@pytest.mark.parametrize("content", [None, [1, 2], {"state_dict": 3}])
def test_checkpoint_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    path = str(tmp_path / "a.pth")
    with pytest.raises(UsageError, match="a.pth holds no state dict, got "):
        check_weights(nn.Linear(1, 1), path, preflight.read_local(path))


@pytest.mark.parametrize("zip_file", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoint_that_fits(tmp_path, zip_file, prefix):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm2d(4))
    state = {prefix + name: value for name, value in model.state_dict().items()}
    state["bookkeeping"] = torch.zeros(2)
    path = str(tmp_path / "a.pth")
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=zip_file)
    content = preflight.read_local(path)
    check_weights(model, path, content)
    check_weights(nn.DataParallel(model), path, content)
    model.test_step = None  # what a model under test-time augmentation must have
    check_weights(SegTTAModel(model), path, content)
    assert preflight.read_local("https://example.org/a.pth") is None


@pytest.mark.parametrize("size", [0, "1.5"])
def test_empty_batch(refusal, digits, size):
    values = options("mmdet", digits, train_dataloader__batch_size=size)
    assert refusal("train", CONFIGS["mmdet"], *values) == (
        f"train_dataloader.batch_size must be an integer of at least 1, got {size}"
    )


def test_batch_of_one_image_for_batch_normalisation(refusal, digits):
    values = options("mmseg", digits, train_dataloader__batch_size=1)
    assert refusal("train", CONFIGS["mmseg"], *values) == (
        "train_dataloader.batch_size must be at least 2: UPerHead normalises maps of one position "
        "over the batch (SyncBN), got 1"
    )


EPOCHS = """
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=1)
train_dataloader = dict(sampler=dict(type="DefaultSampler", shuffle=True))
param_scheduler = []
"""


@pytest.mark.parametrize("loop", [EPOCHS, EPOCHS.split("\n", 2)[2]], ids=["epochs", "iterations"])
def test_last_batch_of_one_image_for_batch_normalisation(refusal, digits, tmp_path, loop):
    (tmp_path / "config.py").write_text(f"_base_ = [{str(CONFIGS['mmseg'])!r}]\n{loop}")
    values = options("mmseg", digits, train_dataloader__batch_size=5)
    assert refusal("train", "config.py", *values) == (
        "the last training batch of an epoch has 1 of the 16 images, in batches of 5, and UPerHead "
        "normalises maps of one position over the batch (SyncBN): set train_dataloader.drop_last="
        "True or another batch_size"
    )


@pytest.mark.parametrize(
    "images, world, change, refused",
    [
        (12, 1, {}, True),
        (13, 1, {}, False),
        (12, 1, {"drop_last": True}, False),
        (12, 1, {"norm": "GN"}, False),
        (12, 1, {"max_iters": 1}, False),
        (12, 1, {"max_iters": 2}, True),
        (12, 1, {"sampler": InfiniteSampler}, False),
        # Each of two processes has 12 images, with one that is seen twice.
        (23, 2, {}, True),
        (23, 2, {"norm": "SyncBN"}, False),
        (22, 2, {}, False),
        # Without rounding up, the second process has 11.
        (23, 2, {"round_up": False}, False),
        (24, 2, {"round_up": False}, True),
    ],
)
def test_last_batch(monkeypatch, images, world, change, refused):
    monkeypatch.setattr("mmengine.dataset.sampler.get_dist_info", lambda: (world - 1, world))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    kind = change.get("sampler", DefaultSampler)
    rounding = {"round_up": change.get("round_up", True)} if kind is DefaultSampler else {}
    sampler = kind(range(images), seed=0, **rounding)
    loader = DataLoader(
        range(images), 11, sampler=sampler, drop_last=change.get("drop_last", False)
    )
    head = dict(type="UPerHead", norm_cfg=dict(type=change.get("norm", "BN")))
    if limit := change.get("max_iters"):
        loop = SimpleNamespace(dataloader=loader, max_iters=limit)
    else:
        loop = EpochBasedTrainLoop(SimpleNamespace(), loader, max_epochs=1)
    runner = SimpleNamespace(cfg=Config(dict(model=dict(decode_head=head))), train_loop=loop)
    if refused:
        with pytest.raises(UsageError, match="has 1 of the 12 images, in batches of 11"):
            preflight.check_last_batch(runner)
    else:
        preflight.check_last_batch(runner)


def test_auxiliary_head_that_does_not_fit(refusal, digits):
    values = options("mmseg", digits, model__auxiliary_head__in_channels=64)
    assert refusal("train", CONFIGS["mmseg"], *values) == (
        "model.auxiliary_head.in_channels must be the backbone's 128, got 64"
    )
