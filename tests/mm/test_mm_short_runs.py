"""A short training of each published detector and segmentor: evaluated, saved and resumed.

Only sizes are reduced: small images, narrow models, two iterations. The data are digits under the
names and in the layout of COCO, ADE20K and Cityscapes. Other schedules and backbones of a model
differ in numbers alone, which test_mm_configs.py names the tests of. Models of the published size
train in docs/cityscapes.md, whose commands are a test.
"""

import json
from pathlib import Path

import pytest
from mm_tiny import as_coco, last_path, loaders, narrow, run, train_and_resume

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COCO = ["coco/bbox_mAP", "coco/segm_mAP"]
SCORES = [f"cityscapes/{name}" for name in ("IoU", "iIoU", "IoU_sup", "iIoU_sup")]


@pytest.fixture(scope="module")
def coco(digits, tmp_path_factory):
    return as_coco(digits, tmp_path_factory.mktemp("coco"))


def segmentor(root, size, **settings):
    """--cfg-options for crops [H, W] and an evaluation after two iterations."""
    height, width = size
    values = loaders(dataset__data_root=root, **settings) | {
        "train_cfg.val_interval": 2,
        "train_dataloader.dataset.pipeline.3.crop_size": f"({height},{width})",
        "model.data_preprocessor.size": f"({height},{width})",
    }
    return values


def ade20k(digits):
    return segmentor(digits, (64, 64), dataset__indices=2) | {
        "train_dataloader.dataset.pipeline.2.scale": "(256,64)",
        "test_dataloader.dataset.pipeline.1.scale": "(256,64)",
        **{
            f"val_dataloader.dataset.pipeline.1.transforms.0.{view}.scale": "(256,64)"
            for view in range(6)
        },
    }


def cityscapes_semantic(root):
    return segmentor(root, (32, 64)) | {
        "train_dataloader.dataset.pipeline.2.scale": "(128,64)",
        "val_dataloader.dataset.pipeline.1.scale": "(96,48)",
        "test_dataloader.dataset.pipeline.1.scale": "(96,48)",
    }


def detector(scale):
    """--cfg-options for an evaluation after two epochs, fewer boxes, and results from a model that
    has learnt nothing."""
    return {
        "train_cfg.val_begin": 2,
        "model.train_cfg.rpn_proposal.max_per_img": 50,
        "model.test_cfg.rpn.max_per_img": 20,
        "model.test_cfg.rcnn.score_thr": 0.0,
        "model.test_cfg.rcnn.max_per_img": 5,
        "val_dataloader.dataset.pipeline.1.scale": scale,
        "test_dataloader.dataset.pipeline.1.scale": scale,
    }


def coco_detector(root, stages=("",)):
    values = loaders(dataset__data_root=root, dataset__indices=2) | detector("(96,64)")
    for stage in stages:
        values[f"model.train_cfg.rcnn.{stage}sampler.num"] = 16
    for place in ("0.0", "1.0", "1.2"):
        key = f"train_dataloader.dataset.pipeline.3.transforms.{place}.scales"
        values[key] = "[(64,96),(80,96)]"
    for part in ("val", "test"):
        values[f"{part}_evaluator.ann_file"] = f"{root}/annotations/instances_val2017.json"
    return values


def cityscapes_instances(root):
    dataset = "train_dataloader.dataset.dataset"
    values = loaders() | detector("(96,48)")
    values |= {
        "model.train_cfg.rcnn.sampler.num": 16,
        "train_dataloader.dataset.times": 1,
        f"{dataset}.data_root": root,
        f"{dataset}.indices": 1,
        f"{dataset}.pipeline.2.scale": "[(96,48),(96,64)]",
    }
    for part in ("val", "test"):
        values[f"{part}_dataloader.dataset.data_root"] = root
        file = f"{root}/annotations/instancesonly_filtered_gtFine_val.json"
        values[f"{part}_evaluator.0.ann_file"] = file
        values[f"{part}_evaluator.1.seg_prefix"] = f"{root}/gtFine/val"
    return values


RUNS = {
    # model: config, data, its options, metrics
    "mask-rcnn": (
        "mmdet/elsa_swin/mask-rcnn_elsa-swin-t-p4-w7_fpn_amp-ms-crop-1x_coco.py",
        "coco",
        coco_detector,
        COCO,
    ),
    "cascade-mask-rcnn": (
        "mmdet/elsa_swin/"
        "cascade-mask-rcnn_elsa-swin-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-1x_coco.py",
        "coco",
        lambda root: coco_detector(root, ("0.", "1.", "2.")),
        COCO,
    ),
    "mask-rcnn of Cityscapes": (
        "mmdet/elsa_swin/mask-rcnn_elsa-swin-t-p4-w7_fpn_amp-1x_cityscapes.py",
        "cityscapes",
        cityscapes_instances,
        [*COCO, "cityscapes/mAP", "cityscapes/AP@50"],
    ),
    "upernet": (
        "mmseg/elsa_swin/"
        "elsa-swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
        "digits",
        ade20k,
        ["mIoU", "aAcc"],
    ),
    "mask-rcnn of ELSA-VOLO": (
        "mmdet/elsa_volo/mask-rcnn_elsa-volo-d1_fpn_amp-ms-crop-3x_coco.py",
        "coco",
        coco_detector,
        COCO,
    ),
    "upernet of ELSA-VOLO": (
        "mmseg/elsa_volo/elsa-volo-d1-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
        "digits",
        ade20k,
        ["mIoU", "aAcc"],
    ),
    "upernet of Cityscapes": (
        "mmseg/elsa_swin/"
        "elsa-swin-tiny-patch4-window7-in1k-pre_upernet_4xb2-80k_cityscapes-512x1024.py",
        "cityscapes",
        cityscapes_semantic,
        ["mIoU", "aAcc"],
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("model", RUNS)
def test_short_training_evaluates_saves_and_resumes(model, request, tmp_path):
    name, data, options, metrics = RUNS[model]
    path = CONFIGS / name
    values = options(request.getfixturevalue(data)) | narrow(Config.fromfile(path).model)
    last = train_and_resume(path, "max_epochs" if "rcnn" in model else "max_iters", **values)
    assert set(metrics) <= set(last)
    if model == "mask-rcnn of Cityscapes":
        assert 0 <= last["cityscapes/mAP"] <= last["cityscapes/AP@50"] <= 1
    if model == "upernet of Cityscapes":
        run("test", path, last_path(), "--work-dir", "test", **values)
        (scores,) = (json.loads(file.read_text()) for file in Path("test").glob("*/2*.json"))
        assert all(0 <= scores[name] <= 100 for name in SCORES)
        # Of 19 classes, those that are neither in the truth nor predicted have no score in either.
        assert scores["cityscapes/IoU"] == pytest.approx(scores["mIoU"], abs=0.01)
        assert sorted(one.name for one in tmp_path.iterdir()) == ["runs", "test"]
