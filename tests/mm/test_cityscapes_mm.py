"""Cityscapes' metric in MMSegmentation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, METRICS, DefaultScope
from mmseg.structures import SegDataSample

from elsa_mm.cityscapes import CityscapesScores

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SEGMENTOR = max(CONFIGS.glob("mmseg/elsa_swin/*cityscapes*.py"))
SCORES = [f"cityscapes/{name}" for name in ("IoU", "iIoU", "IoU_sup", "iIoU_sup")]


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
