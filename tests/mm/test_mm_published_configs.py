"""The published configs of MMDetection and MMSegmentation: names, sizes, and a short training each.

Only sizes are reduced: small images, narrow models, two iterations. The data are digits under
COCO's and ADE20K's names and file layout. Models of the published size train in docs/cityscapes.md,
whose commands are a test.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from mm_tiny import narrow
from mmdet.datasets import CocoDataset
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmseg.visualization import SegLocalVisualizer

from elsa_mm import cli

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LEAVES = sorted(
    [*CONFIGS.glob("mmdet/elsa_swin/*_coco.py"), *CONFIGS.glob("mmseg/elsa_swin/*_ade20k-*.py")]
)
DETECTOR = re.compile(
    r"(?P<method>(cascade-)?mask-rcnn)_elsa-swin-(?P<arch>[ts])-p4-w7_fpn_"
    r"(?P<head>4conv1fc-giou_)?amp-ms-crop-(?P<schedule>[13])x_coco"
)
SEGMENTOR = re.compile(
    r"elsa-swin-(?P<arch>tiny|small)-patch4-window7-in1k-pre_(?P<method>upernet)_8xb(?P<batch>\d)-"
    r"(?P<schedule>\d+)k_ade20k-(?P<crop>\d+)x(?P=crop)"
)
MILLIONS = {
    ("mask-rcnn", "tiny"): 49,
    ("mask-rcnn", "small"): 72,
    ("cascade-mask-rcnn", "tiny"): 86,
    ("cascade-mask-rcnn", "small"): 110,
    ("upernet", "tiny"): 61,
    ("upernet", "small"): 85,
}
METRICS = {"mmdet": ["coco/bbox_mAP", "coco/segm_mAP"], "mmseg": ["mIoU", "aAcc"]}
every_leaf = pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)


def is_detector(path):
    return path.parts[-3] == "mmdet"


def test_all_published_models_are_there():
    words = [(DETECTOR if is_detector(p) else SEGMENTOR).fullmatch(p.stem) for p in LEAVES]
    found = sorted((m["method"], m["arch"][0], m["schedule"]) for m in words)
    detectors = [(m, a, s) for m in ("cascade-mask-rcnn", "mask-rcnn") for a in "st" for s in "13"]
    assert found == sorted([*detectors, ("upernet", "s", "160"), ("upernet", "t", "160")])


@every_leaf
def test_name_and_content_agree(path):
    cfg = Config.fromfile(path)
    backbone, model = cfg.model.backbone, cfg.model
    name = (DETECTOR if cfg.default_scope == "mmdet" else SEGMENTOR).fullmatch(path.stem)
    assert backbone.type == "ELSASwin" and backbone.arch[0] == name["arch"][0]
    if cfg.default_scope == "mmseg":
        assert model.decode_head.type == "UPerHead"
        assert cfg.train_dataloader.batch_size == int(name["batch"])
        assert cfg.train_cfg.max_iters == 1000 * int(name["schedule"])
        assert tuple(model.data_preprocessor.size) == (int(name["crop"]),) * 2
        assert cfg.train_dataloader.dataset.type == "ADE20KDataset"
        assert cfg.optim_wrapper.type == "OptimWrapper"  # no "amp" in the name
    else:
        assert cfg.train_cfg.max_epochs == 12 * int(name["schedule"])
        assert cfg.optim_wrapper.type == "AmpOptimWrapper"
        assert cfg.train_dataloader.dataset.type == "elsa_mm.coco.CocoDataset"
        pipeline = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
        branches = [[step.type for step in steps] for steps in pipeline["RandomChoice"].transforms]
        assert (
            any("RandomCrop" in steps for steps in branches) and "RandomChoiceResize" in branches[0]
        )
        kind = {"mask-rcnn": "MaskRCNN", "cascade-mask-rcnn": "CascadeRCNN"}[name["method"]]
        assert model.type == kind and model.neck.type == "FPN"
        heads = model.roi_head.bbox_head
        assert bool(name["head"]) == isinstance(heads, list)
        for head in heads if isinstance(heads, list) else []:
            assert (head.num_shared_convs, head.num_shared_fcs) == (4, 1)
            assert head.loss_bbox.type == "GIoULoss"
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in MODELS.build(model).parameters())
    assert round(parameters / 1e6) == MILLIONS[name["method"], backbone.arch]


@pytest.fixture(scope="module")
def coco(digits, tmp_path_factory):
    """The digits as COCO 2017: its folders, files and 80 classes, of which the data shows 10."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    names = CocoDataset.METAINFO["classes"]
    for part, name in (("training", "train2017"), ("validation", "val2017")):
        (root / name).symlink_to(digits / "images" / part)
        content = json.loads((digits / f"annotations/instances_{part}.json").read_text())
        content["categories"] = [{"id": id, "name": name} for id, name in enumerate(names, 1)]
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
    return root


def short(path, root):
    """--cfg-options for one iteration on images of 64 pixels, an evaluation after two."""
    values = {"default_hooks.logger.interval": 1}
    for part, images in (("train", 2), ("val", 2), ("test", 2)):
        loader = f"{part}_dataloader"
        values |= {
            f"{loader}.dataset.data_root": root,
            f"{loader}.dataset.indices": images,
            f"{loader}.num_workers": 0,
            f"{loader}.persistent_workers": False,
        }
    return values | (short_detector(path, root) if is_detector(path) else SHORT_SEGMENTOR)


SHORT_SEGMENTOR = {
    "train_cfg.max_iters": 1,
    "train_cfg.val_interval": 2,
    "train_dataloader.dataset.pipeline.2.scale": "(256,64)",
    "train_dataloader.dataset.pipeline.3.crop_size": "(64,64)",
    **{
        f"val_dataloader.dataset.pipeline.1.transforms.0.{view}.scale": "(256,64)"
        for view in range(6)
    },
    "test_dataloader.dataset.pipeline.1.scale": "(256,64)",
    "model.data_preprocessor.size": "(64,64)",
}


def short_detector(path, root):
    """Also fewer boxes, and results from a model that has learnt nothing."""
    values = {
        "train_cfg.max_epochs": 1,
        "train_cfg.val_begin": 2,
        "model.train_cfg.rpn_proposal.max_per_img": 50,
        "model.test_cfg.rpn.max_per_img": 20,
        "model.test_cfg.rcnn.score_thr": 0.0,
        "model.test_cfg.rcnn.max_per_img": 5,
    }
    for stage in ("0.", "1.", "2.") if "cascade" in path.name else ("",):
        values[f"model.train_cfg.rcnn.{stage}sampler.num"] = 16
    for place in ("0.0", "1.0", "1.2"):
        key = f"train_dataloader.dataset.pipeline.3.transforms.{place}.scales"
        values[key] = "[(64,96),(80,96)]"
    for part in ("val", "test"):
        values[f"{part}_dataloader.dataset.pipeline.1.scale"] = "(96,64)"
        values[f"{part}_evaluator.ann_file"] = f"{root}/annotations/instances_val2017.json"
    return values


def run(tool, *arguments, **options):
    """Runs a tool that must succeed."""
    pairs = [f"{key.replace('__', '.')}={value}" for key, value in options.items()]
    arguments = [*map(str, arguments), "--cfg-options", *pairs]
    assert getattr(cli, tool)(arguments) == 0


def last_state():
    path = Path("runs/last_checkpoint").read_text()
    return torch.load(path, weights_only=False, mmap=True, map_location="cpu")


@pytest.fixture
def fresh_visualizer():
    """The visualizer of a process lives on and writes to the first work folder."""
    for kind in (DetLocalVisualizer, SegLocalVisualizer):
        kind._instance_dict.clear()


@pytest.mark.usefixtures("fresh_visualizer")
@every_leaf
def test_short_training_evaluates_saves_and_resumes(path, coco, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    detector = is_detector(path)
    options = short(path, coco if detector else digits) | narrow(Config.fromfile(path).model)
    run("train", path, "--work-dir", "runs", **options)
    assert last_state()["meta"]["iter"] == 1
    assert not list(Path("runs").glob("*/2*.json"))  # no evaluation yet

    options |= {"train_cfg.max_epochs": 2} if detector else {"train_cfg.max_iters": 2}
    run("train", path, "--work-dir", "runs", "--resume", **options)
    state = last_state()
    assert state["meta"]["iter"] == 2
    assert {int(values["step"]) for values in state["optimizer"]["state"].values()} == {2}
    logs = sorted(Path("runs").glob("*/vis_data/2*.json"))
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert set(METRICS[path.parts[-3]]) <= set(lines[-1])
