"""All configs for MMDetection and MMSegmentation load, build and say what they are."""

import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope

from examples.digits.dataset import CLASSES, PALETTE, SEGMENTATION_CLASSES, SEGMENTATION_PALETTE

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LEAVES = sorted(
    path
    for framework in ("mmdet", "mmpretrain", "mmseg")
    for path in (CONFIGS / framework).rglob("*.py")
    if "_base_" not in path.parts
)
DETECTOR = CONFIGS / "mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py"
SEGMENTOR = CONFIGS / "mmseg/digits/elsa-swin_upernet_digits.py"
CASCADE = max(CONFIGS.glob("mmdet/elsa_swin/cascade*.py"))
name_of = pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
# What the published ones hold is for test_mm_published_configs.py and test_recipes.py to say.
digits_name_of = pytest.mark.parametrize("path", [DETECTOR, SEGMENTOR], ids=lambda path: path.stem)


def build(cfg):
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def millions(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def test_the_leaves_are_found():
    assert {DETECTOR, SEGMENTOR} <= set(LEAVES)


@name_of
def test_leaf_is_short_and_imports_the_adapter(path):
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) <= 15
    cfg = Config.fromfile(path)
    assert cfg.custom_imports.imports == ["elsa_mm"]
    assert cfg.default_scope == path.relative_to(CONFIGS).parts[0]


@name_of
def test_leaf_evaluates_images_of_one_size_at_a_time(path):
    cfg = Config.fromfile(path)
    if cfg.default_scope == "mmpretrain":  # all of one size, after a resize or crop to it
        return
    assert cfg.val_dataloader.batch_size == cfg.test_dataloader.batch_size == 1
    assert cfg.default_hooks.sizes.type == "EqualSizesHook"


@pytest.mark.parametrize("path", [DETECTOR, SEGMENTOR, CASCADE], ids=lambda path: path.stem)
def test_config_survives_the_copy_that_a_run_keeps(path):
    cfg = Config.fromfile(path)
    assert Config.fromstring(cfg.pretty_text, ".py").to_dict() == cfg.to_dict()


@digits_name_of
def test_name_and_content_agree(path):
    cfg = Config.fromfile(path)
    model = build(cfg)
    assert type(model.backbone).__name__ == "ELSASwin"
    kinds = {"mask-rcnn": "MaskRCNN", "upernet": "EncoderDecoder"}
    assert [kind for word, kind in kinds.items() if word in path.stem] == [type(model).__name__]
    for part in ("train", "val", "test"):
        root = cfg[f"{part}_dataloader"].dataset.data_root
        assert ("digits" in path.stem) == ("digits" in root)


@digits_name_of
def test_decay_spares_exactly_the_names_with_norm(path):
    cfg = Config.fromfile(path)
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(group["params"][0]): group["weight_decay"] for group in groups}
    assert all(len(group["params"]) == 1 for group in groups)
    assert {group["lr"] for group in groups} == {cfg.optim_wrapper.optimizer.lr}
    names = dict(model.named_parameters())
    spared = {name for name, parameter in names.items() if decay[id(parameter)] == 0}
    assert spared == {name for name in names if "norm" in name}
    decayed = {decay[id(parameter)] for name, parameter in names.items() if name not in spared}
    assert decayed == {cfg.optim_wrapper.optimizer.weight_decay}
    assert all(f"backbone.norm{stage}.weight" in spared for stage in range(4))
    assert any(name.endswith(".rb") for name in names.keys() - spared)


def test_batch_norm_of_the_heads_is_decayed():
    names = {name for name, _ in build(Config.fromfile(SEGMENTOR)).named_parameters()}
    assert any(".bn." in name and "norm" not in name for name in names)


@digits_name_of
def test_digits_schedule_is_one_cycle(path):
    cfg = Config.fromfile(path)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.max_lr)
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optimizer))
        for scheduler in cfg.param_scheduler
    ]
    rates = []
    for _ in range(cfg.train_cfg.max_iters):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    peak = rates.index(max(rates))
    assert math.isclose(rates[peak], cfg.max_lr) and 0 < peak < len(rates) / 2
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert rates[0] < cfg.max_lr / 20 and rates[-1] < cfg.max_lr / 1000
    assert cfg.default_hooks.checkpoint.interval < cfg.train_cfg.max_iters


@pytest.mark.parametrize(
    "path, classes, palette",
    [
        (DETECTOR, CLASSES, PALETTE),
        (SEGMENTOR, SEGMENTATION_CLASSES, SEGMENTATION_PALETTE),
    ],
    ids=["mmdet", "mmseg"],
)
def test_digits_classes_are_the_generators(path, classes, palette):
    cfg = Config.fromfile(path)
    for part in ("train", "val", "test"):
        dataset = cfg[f"{part}_dataloader"].dataset
        assert tuple(dataset.metainfo.classes) == classes
        assert tuple(map(tuple, dataset.metainfo.palette)) == palette
        assert not [t for t in dataset.pipeline if "Flip" in t.type]  # digits have no mirror image


def test_general_mask_rcnn_has_the_published_size():
    cfg = Config.fromfile(CONFIGS / "mmdet/_base_/models/mask-rcnn_elsa-swin_fpn.py")
    init_default_scope("mmdet")
    with torch.device("meta"):
        assert round(millions(MODELS.build(cfg.model))) == 49


def test_general_upernet_has_the_published_size():
    cfg = Config.fromfile(CONFIGS / "mmseg/_base_/models/upernet_elsa-swin.py")
    cfg.merge_from_dict(
        {"model.decode_head.num_classes": 150, "model.auxiliary_head.num_classes": 150}
    )
    init_default_scope("mmseg")
    with torch.device("meta"):
        assert round(millions(MODELS.build(cfg.model))) == 61
