"""The configs of docs/own-dataset.md: the same for one's own data in both frameworks."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from docs_blocks import REPOSITORY, read_page
from mmengine.config import Config
from mmengine.registry import MODELS, TASK_UTILS, init_default_scope

from elsa_d2 import load_config

BASES = sorted(path for path in (REPOSITORY / "configs").rglob("own_data/*"))


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """A folder with the guide's configs."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    for block in read_page(REPOSITORY / "docs/own-dataset.md"):
        if block.mark == "file":
            (folder / block.what).write_text(block.code)
    return folder


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def schedule_of_detectron2(cfg):
    solver = cfg.SOLVER
    assert solver.LR_SCHEDULER_NAME == "WarmupCosineLR"
    return {
        "images": solver.IMS_PER_BATCH,
        "iterations": solver.MAX_ITER,
        "warmup": solver.WARMUP_ITERS,
        "rate": solver.BASE_LR,
        "decay": solver.WEIGHT_DECAY,
        "betas": tuple(solver.BETAS),
        "evaluation": cfg.TEST.EVAL_PERIOD,
    }


def schedule_of_openmmlab(cfg):
    warmup, cosine = cfg.param_scheduler
    assert cosine.type == "CosineAnnealingLR" and cosine.begin == warmup.end
    assert cosine.end == cfg.train_cfg.max_iters
    optimizer = cfg.optim_wrapper.optimizer
    return {
        "images": cfg.train_dataloader.batch_size,
        "iterations": cfg.train_cfg.max_iters,
        "warmup": warmup.end,
        "rate": optimizer.lr,
        "decay": optimizer.weight_decay,
        "betas": optimizer.betas,
        "evaluation": cfg.train_cfg.val_interval,
    }


def instances_of_detectron2(path):
    cfg = load_config(str(path), ["MODEL.DEVICE", "meta"])
    shapes = [ShapeSpec(stride=stride) for stride in (4, 8, 16, 32, 64)]
    anchors = [cell.double() for cell in build_anchor_generator(cfg, shapes).cell_anchors]
    return schedule_of_detectron2(cfg) | {
        "sizes": list(cfg.INPUT.MIN_SIZE_TRAIN),
        "limit": cfg.INPUT.MAX_SIZE_TRAIN,
        "test": (cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST),
        "resize": cfg.INPUT.RESIZE_BACKEND,
        "flip": {"none": 0.0, "horizontal": 0.5}[cfg.INPUT.RANDOM_FLIP],
        "anchors": [sorted(cell.round().tolist()) for cell in anchors],
        "samples": (cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE),
        "proposals": (cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TEST),
        "detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "parameters": parameters(build_model(cfg)),
    }


def instances_of_openmmlab(path):
    cfg = Config.fromfile(path)
    init_default_scope("mmdet")
    _, _, resize, flip, _ = cfg.train_dataloader.dataset.pipeline
    assert (resize.type, flip.type) == ("RandomChoiceResize", "RandomFlip")
    test = {cfg[f"{part}_dataloader"].dataset.pipeline[1].scale for part in ("val", "test")}
    model = cfg.model
    anchors = TASK_UTILS.build(model.rpn_head.anchor_generator).base_anchors
    with torch.device("meta"):
        size = parameters(MODELS.build(model))
    return schedule_of_openmmlab(cfg) | {
        "sizes": [min(scale) for scale in resize.scales],
        "limit": max(map(max, resize.scales)),
        "test": test.pop(),
        "resize": "cv2",
        "flip": flip.prob,
        "anchors": [sorted(cell.round().tolist()) for cell in anchors],
        "samples": (model.train_cfg.rpn.sampler.num, model.train_cfg.rcnn.sampler.num),
        "proposals": (model.train_cfg.rpn_proposal.max_per_img, model.test_cfg.rpn.max_per_img),
        "detections": model.test_cfg.rcnn.max_per_img,
        "parameters": size,
    }


@pytest.mark.parametrize("name", ["my_detector", "my_sizes"])
def test_detectors_are_the_same_in_both_frameworks(name, guide, monkeypatch):
    monkeypatch.chdir(guide)
    first = instances_of_detectron2(guide / f"{name}.yaml")
    second = instances_of_openmmlab(guide / f"{name}.py")
    assert first == second
    assert (first["flip"], first["iterations"]) == {
        "my_detector": (0.5, 600),
        "my_sizes": (0.0, 1200),
    }[name]


def test_segmentors_are_the_same_in_both_frameworks(guide, monkeypatch):
    monkeypatch.chdir(guide)
    d2 = load_config("my_segmentor.yaml", ["MODEL.DEVICE", "meta"])
    mm = Config.fromfile("my_segmentor.py")
    init_default_scope("mmseg")
    _, _, resize, crop, flip, colour, _ = mm.train_dataloader.dataset.pipeline
    assert colour.type == "PhotoMetricDistortion" and flip.type == "RandomFlip"
    heads = [mm.model.decode_head, mm.model.auxiliary_head]
    node = d2.INPUT.SEM_SEG
    assert schedule_of_detectron2(d2) == schedule_of_openmmlab(mm)
    assert (tuple(node.SCALE), tuple(node.RATIO_RANGE)) == (resize.scale, resize.ratio_range)
    assert (tuple(node.CROP_SIZE), node.MAX_CATEGORY_RATIO) == (crop.crop_size, crop.cat_max_ratio)
    assert (node.COLOR_AUG, d2.INPUT.RANDOM_FLIP, flip.prob) == (True, "horizontal", 0.5)
    assert tuple(mm.model.data_preprocessor.size) == crop.crop_size
    assert mm.test_dataloader.dataset.pipeline[1].scale == resize.scale
    assert (d2.INPUT.MAX_SIZE_TEST, d2.INPUT.MIN_SIZE_TEST) == resize.scale
    for head in heads:
        assert list(d2.MODEL.SEM_SEG_HEAD.CLASS_WEIGHT) == head.loss_decode.class_weight
    for part in [mm.model.decode_head, mm.model.auxiliary_head]:
        part.norm_cfg = {"type": "BN"}  # SyncBN does not build on a CPU in every version
    with torch.device("meta"):
        assert parameters(build_model(d2)) == parameters(MODELS.build(mm.model))


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.name)
def test_bases_know_nothing_of_the_digits(path):
    if path.suffix == ".yaml":
        cfg = load_config(str(path))
        lists = (cfg.DATASETS.REGISTER_COCO, cfg.DATASETS.REGISTER_SEM_SEG)
        assert not any(lists) and not cfg.MODEL.SEM_SEG_HEAD.CLASS_WEIGHT
        return
    cfg = Config.fromfile(path)
    assert "digits" not in cfg.pretty_text and "class_weight" not in cfg.pretty_text
    for part in ("train", "val", "test"):
        assert "data_root" not in cfg[f"{part}_dataloader"].dataset


def test_the_bases_are_found():
    assert len(BASES) == 4 and all(isinstance(path, Path) for path in BASES)
