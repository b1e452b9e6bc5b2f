"""Damaged files in COCO's format through MMDetection's start.

What the checker calls complete is read to the last image and evaluated; all else is refused in one
sentence.
"""

import copy
import json
from types import SimpleNamespace

import numpy as np
import torch
from coco_mutations import compare, warmed_up, written
from mm_tiny import CONFIGS
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from mmengine.registry import DefaultScope

from elsa_mm import classes, preflight
from elsa_mm.evaluators import use_coco_metric
from elsa_mm.safe_loading import replace_readers

CONFIG = Config.fromfile(CONFIGS["mmdet"])
DefaultScope.get_instance("fuzz", scope_name="mmdet")


class Start:
    """A runner's part: data sets and evaluators that are built when they are asked for."""

    def __init__(self, cfg):
        self.cfg = cfg

    @property
    def train_loop(self):
        return self.loop("train")

    @property
    def val_loop(self):
        return self.loop("val")

    def loop(self, part):
        loader = self.cfg[f"{part}_dataloader"]
        replace_readers(loader)
        dataset = DATASETS.build(loader.dataset)
        evaluator = SimpleNamespace(metrics=())
        if part == "val":
            evaluator.metrics = [METRICS.build(self.cfg.val_evaluator)]
        return SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset), evaluator=evaluator)


def config(masks):
    cfg = copy.deepcopy(CONFIG)
    names = categories()
    for part in ("train", "val"):
        dataset = cfg[f"{part}_dataloader"].dataset
        dataset.update(data_root="", ann_file="annotations.json", data_prefix=dict(img="images"))
        dataset.pop("indices", None)
        dataset.metainfo = dict(classes=names)
        for step in dataset.pipeline:
            if step["type"] == "LoadAnnotations":
                step["with_mask"] = masks
    cfg.val_evaluator.update(ann_file="annotations.json", metric=["bbox", "segm"][: 1 + masks])
    return cfg


def categories():
    try:
        with open("annotations.json", "rb") as file:
            names = [one["name"] for one in json.loads(file.read())["categories"]]
        return [name for name in dict.fromkeys(names) if isinstance(name, str)] or ["ape"]
    except (KeyError, RecursionError, TypeError, ValueError):
        return ["ape", "zebra", "Ächse"]


def start(cfg, masks):
    parts = ["train", "val"]
    classes.settle(cfg, parts)
    preflight.check_data(cfg, parts)
    use_coco_metric(cfg)
    runner = Start(cfg)
    preflight.build_data(runner, parts)
    classes.check(runner, parts)
    for data in runner.train_loop.dataloader.dataset:
        assert data["inputs"].ndim == 3
    loop = runner.val_loop
    (metric,) = loop.evaluator.metrics
    metric.dataset_meta = loop.dataloader.dataset.metainfo
    for data in loop.dataloader.dataset:
        sample = data["data_samples"]
        found = dict(bboxes=torch.tensor([[1.0, 1, 9, 9]]), scores=torch.tensor([0.5]))
        found["labels"] = torch.tensor([0])
        if masks:
            found["masks"] = torch.ones(1, *sample.ori_shape, dtype=torch.bool)
        one = dict(img_id=sample.img_id, ori_shape=sample.ori_shape, pred_instances=found)
        metric.process({}, [one])
    scores = metric.evaluate(size=len(loop.dataloader.dataset))
    assert np.isfinite(list(scores.values())).all(), scores


@warmed_up
def case(seed):
    written(seed)
    masks = seed % 3 > 0
    compare(lambda: start(config(masks), masks), masks)
