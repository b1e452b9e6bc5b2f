"""What an evaluation writes takes the place of an earlier file; nothing is written in place."""

import json
import os
import pickle
from contextlib import contextmanager

import pytest
import torch
from coco_files import content, write

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.structures import Boxes, Instances
from mmengine.config import Config

import elsa_d2
from elsa_core.runtime.errors import UsageError
from elsa_d2.evaluation.coco import COCOEvaluator
from elsa_mm.cli import _dump_metric
from elsa_mm.coco_metric import CocoMetric

pytestmark = pytest.mark.usefixtures("clean_catalog")


@contextmanager
def replaced(folder, *names):
    """An earlier file has its content still, under another name; no other file is left."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("old")
        os.link(folder / name, folder / f"{name}.link")
    yield
    assert set(os.listdir(folder)) == {*names, *(f"{name}.link" for name in names)}
    for name in names:
        assert (folder / f"{name}.link").read_text() == "old" != (folder / name).read_bytes()


def test_detectron2s_objects_and_proposals(tmp_path):
    file = write(tmp_path, content())
    cfg = elsa_d2.load_config()
    cfg.DATASETS.REGISTER_COCO = [["whole", str(file), str(tmp_path / "images")]]
    elsa_d2.register_coco_datasets(cfg)
    DatasetCatalog.get("whole")
    evaluator = COCOEvaluator("whole", ["bbox"], output_dir=str(tmp_path / "out"))
    box, size = Boxes(torch.tensor([[1.0, 2, 30, 40]])), (100, 100)
    fields = dict(pred_boxes=box, scores=torch.ones(1), pred_classes=torch.zeros(1).long())
    proposals = Instances(size, proposal_boxes=box, objectness_logits=torch.ones(1))
    outputs = [{"instances": Instances(size, **fields), "proposals": proposals}]
    evaluator.reset()
    evaluator.process([{"image_id": json.loads(file.read_text())["images"][0]["id"]}], outputs)
    names = ["instances_predictions.pth", "coco_instances_results.json", "box_proposals.pkl"]
    with replaced(tmp_path / "out", *names):
        assert set(evaluator.evaluate()) == {"bbox", "box_proposals"}
    (found,) = json.loads((tmp_path / "out" / names[1]).read_text())
    assert found["bbox"] == [1, 2, 29, 38]
    assert pickle.loads((tmp_path / "out" / names[2]).read_bytes())["boxes"][0].shape == (1, 4)
    (tmp_path / "out" / names[1]).unlink()
    (tmp_path / "out" / names[1]).mkdir()
    with pytest.raises(UsageError, match=r"coco_instances_results\.json cannot be written"):
        evaluator.evaluate()


def test_detectron2s_label_maps(tmp_path):
    DatasetCatalog.register("whole", list)
    MetadataCatalog.get("whole").set(stuff_classes=["a", "b"], ignore_label=255)
    cfg = elsa_d2.load_config()
    cfg.OUTPUT_DIR = str(tmp_path)
    made = elsa_d2.build_sem_seg_evaluator(cfg, "whole", "out")
    assert isinstance(made, SemSegEvaluator)
    made.reset()
    with replaced(tmp_path / "out", "sem_seg_predictions.json", "sem_seg_evaluation.pth"):
        made.evaluate()
    assert json.loads((tmp_path / "out/sem_seg_predictions.json").read_text()) == []
    assert "mIoU" in torch.load(tmp_path / "out/sem_seg_evaluation.pth", weights_only=False)


@pytest.mark.parametrize("scope", ["mmdet", "mmpretrain"])
def test_the_predictions_of_mmengine(tmp_path, scope):
    metric = _dump_metric(Config({"default_scope": scope}), str(tmp_path / "out/found.pkl"))
    metric.results = [{"img_id": 7}]
    with replaced(tmp_path / "out", "found.pkl"):
        assert metric.evaluate(1) == {}
    assert pickle.loads((tmp_path / "out/found.pkl").read_bytes()) == [{"img_id": 7}]


def test_the_results_of_mmdetection(tmp_path):
    prefix = str(tmp_path / "out/found")
    metric = CocoMetric(metric="bbox", format_only=True, outfile_prefix=prefix)
    metric.cat_ids = [1]
    one = dict(img_id=7, bboxes=torch.ones(1, 4), scores=torch.ones(1), labels=torch.tensor([0]))
    with replaced(tmp_path / "out", "found.bbox.json"):
        files = metric.results2json([one], prefix)
    assert files["bbox"] == f"{prefix}.bbox.json"
    assert json.loads((tmp_path / "out/found.bbox.json").read_text())[0]["image_id"] == 7
