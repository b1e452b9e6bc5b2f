"""All configs of MMDetection, MMSegmentation and MMPretrain load and are what their names say.

The numbers of the published ones are for tests/parity/test_recipes.py, test_cityscapes_configs.py
and test_mm_imagenet_recipes.py to compare.
"""

import math
import re
from pathlib import Path

import built_mm
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from recipes import RECIPES

from examples.digits.dataset import CLASSES, PALETTE, SEGMENTATION_CLASSES, SEGMENTATION_PALETTE

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LEAVES = sorted(path for path in CONFIGS.glob("mm*/*/*.py") if "_base_" not in path.parts)
PUBLISHED = [path for path in LEAVES if path.parent.name in ("elsa_swin", "elsa_volo")]
DETECTOR = CONFIGS / "mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py"
VOLO_DETECTOR = CONFIGS / "mmdet/digits/mask-rcnn_elsa-volo_fpn_digits.py"
SEGMENTOR = CONFIGS / "mmseg/digits/elsa-swin_upernet_digits.py"
CASCADE = max(CONFIGS.glob("mmdet/elsa_swin/cascade*.py"))
PANOPTIC = max(CONFIGS.glob("mmdet/elsa_swin/mask2former*panoptic.py"))
CLASSIFIER = CONFIGS / "mmpretrain/elsa_swin/elsa-swin-base_8xb128_in1k.py"
name_of = pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
# Later heads, whose own norms are not decayed either.
MODERN = [
    CONFIGS / "mmdet/digits/mask2former_elsa-swin_digits.py",
    CONFIGS / "mmdet/digits/mask2former_elsa-swin_digits-panoptic.py",
    CONFIGS / "mmdet/digits/dino_elsa-swin_digits.py",
    CONFIGS / "mmdet/digits/rtmdet-ins_elsa-swin_digits.py",
    CONFIGS / "mmseg/digits/elsa-swin_mask2former_digits.py",
]
all_digits_name_of = pytest.mark.parametrize(
    "path", [DETECTOR, VOLO_DETECTOR, SEGMENTOR, *MODERN], ids=lambda path: path.stem
)
digits_name_of = pytest.mark.parametrize(
    "path", [DETECTOR, VOLO_DETECTOR, SEGMENTOR], ids=lambda path: path.stem
)


def build(cfg):
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def test_the_leaves_are_found():
    assert {DETECTOR, SEGMENTOR} <= set(LEAVES)
    papers = re.compile("rcnn.*_coco|upernet.*_ade20k")
    found = {path for path in PUBLISHED if papers.search(path.stem)}
    assert found == set(map(built_mm.config_of, RECIPES))


@name_of
def test_leaf(path):
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) <= 15
    cfg = Config.fromfile(path)
    assert cfg.custom_imports.imports[0] == "elsa_mm"
    assert cfg.default_scope == path.relative_to(CONFIGS).parts[0]
    assert cfg.default_hooks.checkpoint.type == "StoppableCheckpointHook"
    if cfg.default_scope != "mmpretrain":  # whose images all have one size
        assert cfg.val_dataloader.batch_size == cfg.test_dataloader.batch_size == 1
        assert cfg.default_hooks.sizes.type == "EqualSizesHook"
    if path in PUBLISHED:
        gpus = int(found[1]) if (found := re.search(r"_(\d+)xb\d+", path.stem)) else 8
        assert cfg.auto_scale_lr.base_batch_size == gpus * cfg.train_dataloader.batch_size
        assert not cfg.auto_scale_lr.get("enable")


@pytest.mark.parametrize(
    "path",
    [DETECTOR, VOLO_DETECTOR, SEGMENTOR, CASCADE, CLASSIFIER, *MODERN, PANOPTIC],
    ids=lambda path: path.stem,
)
def test_config_survives_the_copy_that_a_run_keeps(path):
    cfg = Config.fromfile(path)
    assert Config.fromstring(cfg.pretty_text, ".py").to_dict() == cfg.to_dict()


@all_digits_name_of
def test_name_and_content_agree(path):
    cfg = Config.fromfile(path)
    model = build(cfg)
    families = {"elsa-swin": "ELSASwin", "elsa-volo": "ELSAVolo"}
    assert [name for word, name in families.items() if word in path.stem] == [
        type(model.backbone).__name__
    ]
    kinds = {"mask-rcnn": "MaskRCNN", "upernet": "UPerHead", "mask2former": "Mask2FormerHead"}
    kinds |= {"dino": "DINOHead", "rtmdet-ins": "RTMDetInsSepBNHead"}
    found = {type(module).__name__ for module in model.modules()} & set(kinds.values())
    assert found == {kind for word, kind in kinds.items() if word in path.stem}
    for part in ("train", "val", "test"):
        assert "digits" in cfg[f"{part}_dataloader"].dataset.data_root


@digits_name_of
def test_decay_spares_exactly_the_backbones_norms_and_positions(path):
    cfg = Config.fromfile(path)
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(group["params"][0]): group["weight_decay"] for group in groups}
    assert {group["lr"] for group in groups} == {cfg.optim_wrapper.optimizer.lr}
    expected = cfg.optim_wrapper.optimizer.weight_decay
    spared = {
        f"backbone.{name}.{part}"
        for name, module in model.backbone.named_modules()
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d))
        for part in ("weight", "bias")
    } | {"backbone.pos_embed"}
    assert {name: decay[id(parameter)] for name, parameter in model.named_parameters()} == {
        name: 0.0 if name in spared else expected for name, _ in model.named_parameters()
    }


@all_digits_name_of
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
        (VOLO_DETECTOR, CLASSES, PALETTE),
        (SEGMENTOR, SEGMENTATION_CLASSES, SEGMENTATION_PALETTE),
        (MODERN[1], (*CLASSES, "background"), (*PALETTE, (0, 0, 0))),
    ],
    ids=["mmdet", "mmdet-volo", "mmseg", "panoptic"],
)
def test_digits_classes_are_the_generators(path, classes, palette):
    cfg = Config.fromfile(path)
    for part in ("train", "val", "test"):
        dataset = cfg[f"{part}_dataloader"].dataset
        assert tuple(dataset.metainfo.classes) == classes
        assert tuple(map(tuple, dataset.metainfo.palette)) == palette
        assert not [t for t in dataset.pipeline if "Flip" in t.type]  # digits have no mirror image
