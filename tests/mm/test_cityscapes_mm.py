"""Cityscapes in MMDetection and MMSegmentation: the metric, and a short run of each config."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mm_tiny import narrow
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, METRICS, DefaultScope
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer

from elsa_mm import cli
from elsa_mm.cityscapes import CityscapesScores

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LEAVES = sorted(CONFIGS.glob("mm*/elsa_swin/*cityscapes*.py"))
SEGMENTOR = max(path for path in LEAVES if path.parts[-3] == "mmseg")
SCORES = [f"cityscapes/{name}" for name in ("IoU", "iIoU", "IoU_sup", "iIoU_sup")]


def options(path, root):
    """--cfg-options for one iteration on images of 96x48 pixels, an evaluation after two."""
    values = {"default_hooks.logger.interval": 1}
    for part in ("train", "val", "test"):
        loader = f"{part}_dataloader"
        values |= {f"{loader}.num_workers": 0, f"{loader}.persistent_workers": False}
    if path.parts[-3] == "mmseg":
        for part in ("train", "val", "test"):
            values[f"{part}_dataloader.dataset.data_root"] = root
        return values | {
            "train_cfg.max_iters": 1,
            "train_cfg.val_interval": 2,
            "train_dataloader.dataset.pipeline.2.scale": "(128,64)",
            "train_dataloader.dataset.pipeline.3.crop_size": "(32,64)",
            "val_dataloader.dataset.pipeline.1.scale": "(96,48)",
            "test_dataloader.dataset.pipeline.1.scale": "(96,48)",
            "model.data_preprocessor.size": "(32,64)",
        }
    dataset = "train_dataloader.dataset.dataset"
    values |= {
        "train_cfg.max_epochs": 1,
        "train_cfg.val_begin": 2,
        "train_dataloader.dataset.times": 1,
        f"{dataset}.data_root": root,
        f"{dataset}.indices": 1,
        f"{dataset}.pipeline.2.scale": "[(96,48),(96,64)]",
        "model.train_cfg.rpn_proposal.max_per_img": 50,
        "model.train_cfg.rcnn.sampler.num": 16,
        "model.test_cfg.rpn.max_per_img": 20,
        "model.test_cfg.rcnn.score_thr": 0.0,
        "model.test_cfg.rcnn.max_per_img": 5,
    }
    for part in ("val", "test"):
        values[f"{part}_dataloader.dataset.data_root"] = root
        values[f"{part}_dataloader.dataset.pipeline.1.scale"] = "(96,48)"
        file = f"{root}/annotations/instancesonly_filtered_gtFine_val.json"
        values[f"{part}_evaluator.0.ann_file"] = file
        values[f"{part}_evaluator.1.seg_prefix"] = f"{root}/gtFine/val"
    return values


def run(tool, *arguments, **values):
    """Runs a tool that must succeed."""
    pairs = [f"{key}={value}" for key, value in values.items()]
    assert getattr(cli, tool)([*map(str, arguments), "--cfg-options", *pairs]) == 0


def lines(folder):
    logs = sorted(Path(folder).glob("*/vis_data/2*.json"))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


@pytest.fixture
def fresh_visualizer():
    """The visualizer of a process lives on and writes to the first work folder."""
    for kind in (DetLocalVisualizer, SegLocalVisualizer):
        kind._instance_dict.clear()


@pytest.mark.usefixtures("fresh_visualizer")
@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_a_shrunk_leaf_trains_evaluates_saves_and_resumes(path, cityscapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = options(path, cityscapes) | narrow(Config.fromfile(path).model)
    run("train", path, "--work-dir", "runs", **values)
    values |= {"train_cfg.max_epochs": 2} if "rcnn" in path.stem else {"train_cfg.max_iters": 2}
    run("train", path, "--work-dir", "runs", "--resume", **values)
    last = Path("runs/last_checkpoint").read_text()
    state = torch.load(last, weights_only=False, mmap=True, map_location="cpu")
    assert state["meta"]["iter"] == 2
    assert {int(values["step"]) for values in state["optimizer"]["state"].values()} == {2}
    found = lines("runs")
    losses = [line["loss"] for line in found if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    if "rcnn" in path.stem:
        assert {"coco/bbox_mAP", "coco/segm_mAP", "cityscapes/mAP"} <= set(found[-1])
        assert 0 <= found[-1]["cityscapes/mAP"] <= found[-1]["cityscapes/AP@50"] <= 1
        return
    assert 0 <= found[-1]["mIoU"] <= 100
    run("test", path, last, "--work-dir", "test", **values)
    scores = lines("test") or [json.loads(next(Path("test").glob("*/2*.json")).read_text())]
    assert all(0 <= scores[-1][name] <= 100 for name in SCORES)
    # Of 19 classes, those that are neither in the truth nor predicted have no score in either.
    assert scores[-1]["cityscapes/IoU"] == pytest.approx(scores[-1]["mIoU"], abs=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "test"]


def samples(cityscapes, predict):
    """Data samples of the validation part with predictions made of the true labels."""
    cfg = Config.fromfile(SEGMENTOR)
    cfg.val_dataloader.dataset.data_root = str(cityscapes)
    with DefaultScope.overwrite_default_scope("mmseg"):
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        labels = torch.from_numpy(np.array(Image.open(info["seg_map_path"]))).long()
        sample = SegDataSample(metainfo={k: info[k] for k in ("img_path", "seg_map_path")})
        yield {
            **sample.metainfo,
            "pred_sem_seg": {"data": predict(labels)[None]},
            "gt_sem_seg": {"data": labels[None]},
        }


def test_the_truth_as_prediction_is_perfect(cityscapes):
    with DefaultScope.overwrite_default_scope("mmseg"):
        metric = METRICS.build(Config.fromfile(SEGMENTOR).test_evaluator[1])
    assert type(metric) is CityscapesScores
    folder = Path(metric.output_dir)
    count = 0
    for sample in samples(cityscapes, lambda labels: labels.where(labels < 19, 3)):
        metric.process({}, [sample])
        count += 1
    assert count == 4 and len(list(folder.iterdir())) == 4
    assert metric.evaluate(count) == dict.fromkeys(SCORES, 100)
    del metric
    assert not folder.exists()


def test_scores_are_those_of_iou_metric(cityscapes):
    """The mean over classes of both metrics, for predictions that are partly wrong."""
    generator = torch.Generator().manual_seed(0)

    def wrong(labels):
        other = torch.randint(0, 19, labels.shape, generator=generator)
        return torch.where(torch.rand(labels.shape, generator=generator) < 0.4, other, labels % 19)

    with DefaultScope.overwrite_default_scope("mmseg"):
        evaluator = Evaluator(Config.fromfile(SEGMENTOR).test_evaluator)
        evaluator.dataset_meta = {"classes": [str(i) for i in range(19)]}
        for sample in samples(cityscapes, wrong):
            evaluator.process([sample], {})
        found = evaluator.evaluate(4)
    assert 5 < found["cityscapes/IoU"] < 60
    assert found["cityscapes/IoU"] == pytest.approx(found["mIoU"], abs=0.01)


def test_files_are_kept_where_that_is_asked_for(cityscapes, tmp_path):
    metric = CityscapesScores(str(tmp_path / "out"), keep_results=True, format_only=True)
    for sample in samples(cityscapes, lambda labels: labels % 19):
        metric.process({}, [sample])
    assert metric.evaluate(4) == {}
    del metric
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 4 and files[0].name == "countwick_000000_000019_leftImg8bit.png"
    assert set(np.unique(np.array(Image.open(files[0])))) <= set(range(7, 34))
