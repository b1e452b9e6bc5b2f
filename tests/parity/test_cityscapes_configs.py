"""The Cityscapes configs of both frameworks: names, numbers, and that they are the same."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import built_d2
import built_mm
import parity
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver import build_lr_scheduler
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from recipes import check_facts, groups_by_name, upernet

from elsa_core.weights.names import rename
from elsa_d2 import build_optimizer, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ARCHS = {"t": "tiny", "s": "small"}
DROP_PATH = {"mask_rcnn": {"t": 0.1, "s": 0.2}, "upernet": {"t": 0.3, "s": 0.3}}
# With the 80 classes of COCO and the 150 of ADE20K: 49, 72 and 61, 85.
MILLIONS = {"mask_rcnn": {"t": 48, "s": 72}, "upernet": {"t": 61, "s": 84}}
each = pytest.mark.parametrize("method", DROP_PATH)
variants = pytest.mark.parametrize("variant", ARCHS)


def yaml(method, variant):
    end = "fpn" if method == "mask_rcnn" else "80k"
    return CONFIGS / f"detectron2/Cityscapes/{method}_elsa_swin_{variant}_{end}.yaml"


def python(method, variant):
    if method == "mask_rcnn":
        name = f"mask-rcnn_elsa-swin-{variant}-p4-w7_fpn_amp-1x_cityscapes"
        return CONFIGS / f"mmdet/elsa_swin/{name}.py"
    arch = ARCHS[variant]
    name = f"elsa-swin-{arch}-patch4-window7-in1k-pre_upernet_4xb2-80k_cityscapes-512x1024"
    return CONFIGS / f"mmseg/elsa_swin/{name}.py"


def build(method, variant):
    """Both models without memory, and both configs."""
    cfg, other = load_config(str(yaml(method, variant))), Config.fromfile(python(method, variant))
    scope = DefaultScope.overwrite_default_scope(other.default_scope)
    with scope, torch.device("meta"):
        ours = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
        return cfg, ours, other, MODELS.build(other.model)


def test_all_of_them_are_there_and_no_others():
    leaves = {yaml(m, v) for m in DROP_PATH for v in ARCHS}
    found = (CONFIGS / "detectron2/Cityscapes").glob("*.yaml")
    assert {path for path in found if not path.name.startswith("Base-")} == leaves
    leaves = {python(m, v) for m in DROP_PATH for v in ARCHS}
    assert {p for p in CONFIGS.glob("mm*/elsa_swin/*cityscapes*.py")} == leaves


@variants
@each
def test_leaves_are_a_few_lines_and_say_what_their_name_says(method, variant):
    for path in (yaml(method, variant), python(method, variant)):
        assert 3 <= len(path.read_text().splitlines()) <= 15
    cfg, other = load_config(str(yaml(method, variant))), Config.fromfile(python(method, variant))
    assert cfg.MODEL.ELSA_SWIN.ARCH == other.model.backbone.arch == ARCHS[variant]
    rate = DROP_PATH[method][variant]
    assert cfg.MODEL.ELSA_SWIN.DROP_PATH_RATE == other.model.backbone.drop_path_rate == rate
    words = python(method, variant).stem
    assert other.get("default_scope") == ("mmdet" if "rcnn" in words else "mmseg")
    assert ("_amp-" in words) == (other.optim_wrapper.type == "AmpOptimWrapper")
    assert ("_amp-" in words) == cfg.SOLVER.AMP.ENABLED
    if match := re.search(r"(\d)xb(\d)-(\d+)k_cityscapes-(\d+)x(\d+)$", words):
        gpus, batch, thousands, *crop = map(int, match.groups())
        assert other.train_dataloader.batch_size == batch
        assert other.auto_scale_lr.base_batch_size == gpus * batch == cfg.SOLVER.IMS_PER_BATCH
        assert other.train_cfg.max_iters == cfg.SOLVER.MAX_ITER == 1000 * thousands
        assert list(other.model.data_preprocessor.size) == crop
    dataset = other.train_dataloader.dataset
    assert (dataset.dataset if "rcnn" in words else dataset).type.endswith("CityscapesDataset")


@variants
@each
def test_parameters_rates_and_decays_are_equal_in_both_frameworks(method, variant):
    cfg, ours, other, theirs = build(method, variant)
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    if method == "mask_rcnn":
        names = {name: parity.mmdet_name(name) for name in shapes}
    else:
        # Statistics tell a batch norm.
        renamed, unknown = rename(ours.state_dict(), "upernet", "mm")
        assert set(unknown) <= {"pixel_mean", "pixel_std"}
        names = {old: new for new, (old, _) in renamed.items()}
    renamed = {names[name]: shape for name, shape in shapes.items()}
    assert renamed == {name: p.shape for name, p in theirs.named_parameters()}
    count = sum(shape.numel() for shape in shapes.values())
    assert round(count / 1e6) == MILLIONS[method][variant]

    other.optim_wrapper.update(type="OptimWrapper")  # AMP asks for a GPU
    other.optim_wrapper.pop("loss_scale", None)
    expected = rates(theirs, build_optim_wrapper(theirs, other.optim_wrapper).optimizer)
    found = rates(ours, build_optimizer(cfg, ours))
    assert {names[name]: value for name, value in found.items()} == expected
    lr, decay = {"mask_rcnn": (5e-5, 0.05), "upernet": (6e-5, 0.01)}[method]
    assert set(expected.values()) == {(lr, decay, (0.9, 0.999)), (lr, 0.0, (0.9, 0.999))}


def rates(model, optimizer):
    """Name of each parameter -> learning rate, decay, betas."""
    return {
        name: (group["lr"], group["weight_decay"], tuple(group["betas"]))
        for name, group in groups_by_name(model, optimizer).items()
    }


@pytest.mark.parametrize("framework", [built_d2, built_mm], ids=["detectron2", "openmmlab"])
@variants
def test_segmentation_is_the_recipe(framework, variant, monkeypatch):
    recipe = upernet(ARCHS[variant], batch=8, gpus=4)
    path = (yaml if framework is built_d2 else python)("upernet", variant)
    monkeypatch.setattr(framework, "config_of", lambda recipe: path)
    built = framework.Built(recipe)
    ratios = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    expected = recipe.facts() | {
        "crop": ((512, 1024), 0.75),
        "training scale": ((2048, 1024), (0.5, 2.0)),
        "test scale": (2048, 1024),
        "validation scales": [(2048, 1024)],
        "best checkpoint": None,
        "augmented test scales": [(int(2048 * r), int(1024 * r)) for r in ratios],
        "classes": 19,
        "saved every": 8000,
        "evaluated every": 8000,
    }
    check_facts(built.facts(), expected)
    assert built.length() == 80_000
    iterations = [0, 750, 1499, 1500, 1501, 10_000, 79_999]
    wanted = [6e-5 * (1 - i / 80_000) * min(1, 1e-6 + (1 - 1e-6) * i / 1500) for i in iterations]
    assert built.rates(recipe, iterations) == pytest.approx(wanted, rel=1e-9, abs=0)


@variants
def test_detection_has_the_frameworks_own_schedules(variant):
    cfg, other = load_config(str(yaml("mask_rcnn", variant))), python("mask_rcnn", variant)
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.IMS_PER_BATCH) == (24000, (18000,), 8)
    optimizer = build_optimizer(cfg, torch.nn.Linear(1, 1))
    scheduler = build_lr_scheduler(cfg, optimizer)
    for iteration, rate in {0: 5e-8, 500: 5e-5, 17999: 5e-5, 18000: 5e-6, 23999: 5e-6}.items():
        scheduler.last_epoch = iteration
        assert scheduler.get_lr()[0] == pytest.approx(rate)
    other = Config.fromfile(other)
    dataset = other.train_dataloader.dataset
    # 64 times 2,965 images with objects, 8 at a time.
    assert (other.train_cfg.max_epochs, dataset.times, other.train_dataloader.batch_size) == (
        8,
        8,
        1,
    )
    warmup, steps = other.param_scheduler
    assert (warmup.start_factor, warmup.end, steps.milestones) == (0.001, 501, [7])
    assert other.auto_scale_lr.base_batch_size == 8
    assert other.train_cfg.max_epochs * dataset.times * 2965 / 8 == pytest.approx(24000, rel=0.02)


@variants
def test_detection_has_the_same_sizes_and_data(variant):
    cfg, ours, other, theirs = build("mask_rcnn", variant)
    steps = {step.type: step for step in other.train_dataloader.dataset.dataset.pipeline}
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    assert steps["RandomResize"].scale == [(2048, min(sizes)), (2048, max(sizes))]
    assert sizes == tuple(range(800, 1025, 32)) and cfg.INPUT.MAX_SIZE_TRAIN == 2048
    assert other.val_dataloader.dataset.pipeline[1].scale == (2048, 1024)
    assert (cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST) == (2048, 1024)
    assert cfg.INPUT.RESIZE_BACKEND == "cv2" and cfg.DATALOADER.MIN_IMAGE_SIZE == 32
    assert ours.roi_heads.num_classes == theirs.roi_head.bbox_head.num_classes == 8
    assert theirs.roi_head.mask_head.num_classes == 8
    assert cfg.DATASETS.TRAIN == ("cityscapes_fine_instance_seg_train",)
    assert cfg.DATASETS.TEST == ("cityscapes_fine_instance_seg_val",)
    kinds = [metric.type for metric in other.test_evaluator]
    assert kinds == [metric.type for metric in other.val_evaluator]
    assert kinds[0] == "elsa_mm.coco_metric.CocoMetric"
    assert kinds[1:] == ["elsa_mm.cityscapes_instance.CityscapesInstanceScores"]
