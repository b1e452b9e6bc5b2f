"""Predictions where Cityscapes judges nothing: the score is 0 there, and no evaluation ends."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from elsa_core.data.cityscapes_eval import MATCHES, evaluation, patched_evaluation

VOID, BUILDING, PERSON, CAR = 0, 11, 24, 26  # cityscapesscripts' ids
CLASSES = {PERSON: 0, CAR: 2}  # of the frameworks
STEM = "town/town_000000_000019"


@pytest.fixture
def truth(tmp_path, monkeypatch):
    """An image whose upper half is not judged, with a person and a car in its lower half."""
    monkeypatch.chdir(tmp_path)
    ids = np.full((64, 128), BUILDING, np.uint16)
    ids[:32] = VOID
    ids[40:60, 10:40] = PERSON * 1000
    ids[40:60, 60:100] = CAR * 1000
    path = tmp_path / f"gtFine/val/{STEM}_gtFine_instanceIds.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(ids).save(path)
    return ids


@pytest.fixture
def predictions(truth):
    """Class, score and mask: the person as it is, and a car where nothing is judged."""
    above = np.zeros_like(truth, bool)
    above[5:25, 60:100] = True
    return [(PERSON, 0.9, truth == PERSON * 1000), (CAR, 0.8, above)]


def test_the_judge_itself_and_what_it_writes(predictions, tmp_path):
    lines = []
    for i, (label, score, mask) in enumerate(predictions):
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png {label} {score}\n")
    (tmp_path / "pred.txt").write_text("".join(lines))
    evaluation.args.predictionPath = str(tmp_path)
    evaluation.args.gtInstancesFile = str(tmp_path / "instances.json")
    evaluation.args.JSONOutput = False
    files = (
        [str(tmp_path / "pred.txt")],
        [str(tmp_path / f"gtFine/val/{STEM}_gtFine_instanceIds.png")],
    )
    # If the first ends, elsa_core.data.cityscapes_eval may end; the second is NumPy 2.4's.
    with pytest.raises((IndexError, AttributeError)):
        evaluation.evaluateImgLists(*files, evaluation.args)
    assert (tmp_path / MATCHES).exists()
    (tmp_path / MATCHES).unlink()
    with patched_evaluation():
        found = evaluation.evaluateImgLists(*files, evaluation.args)["averages"]
    assert not (tmp_path / MATCHES).exists()
    assert (tmp_path / "instances.json").exists()
    assert found["classes"]["person"] == {"ap": 1, "ap50%": 1}
    assert found["classes"]["car"] == {"ap": 0, "ap50%": 0}
    assert found["allAp"] == 0.5
    with patched_evaluation(keep_matches=True):
        evaluation.evaluateImgLists(*files, evaluation.args)
    matches = json.loads((tmp_path / MATCHES).read_text())
    assert matches and all("groundTruth" in match for match in matches.values())


def test_detectron2(truth, predictions, tmp_path):
    pytest.importorskip("detectron2")
    from detectron2.structures import Instances

    import elsa_d2

    folders = [["judged", str(tmp_path), "val", "instance_seg"]]
    cfg = elsa_d2.load_config("", ["DATASETS.REGISTER_CITYSCAPES", str(folders)])
    elsa_d2.register_cityscapes_datasets(cfg)
    evaluator = elsa_d2.Trainer.build_evaluator(cfg, "judged")
    evaluator.reset()
    instances = Instances(truth.shape)
    instances.pred_classes = torch.tensor([CLASSES[label] for label, _, _ in predictions])
    instances.scores = torch.tensor([score for _, score, _ in predictions])
    instances.pred_masks = torch.from_numpy(np.stack([mask for _, _, mask in predictions]))
    file = tmp_path / f"leftImg8bit/val/{STEM}_leftImg8bit.png"
    evaluator.process([{"file_name": str(file)}], [{"instances": instances}])
    assert evaluator.evaluate()["segm"] == {"AP": 50, "AP50": 50}
    assert not (tmp_path / MATCHES).exists()


def test_mmdetection(predictions, tmp_path):
    pytest.importorskip("mmdet")
    from mmdet.datasets import CityscapesDataset
    from mmengine.registry import METRICS, DefaultScope

    with DefaultScope.overwrite_default_scope("mmdet"):
        metric = METRICS.build(
            {
                "type": "elsa_mm.cityscapes_instance.CityscapesInstanceScores",
                "seg_prefix": str(tmp_path / "gtFine/val"),
                "outfile_prefix": None,
            }
        )
    metric.dataset_meta = CityscapesDataset.METAINFO
    found = {
        "labels": torch.tensor([CLASSES[label] for label, _, _ in predictions]),
        "scores": torch.tensor([score for _, score, _ in predictions]),
        "masks": torch.from_numpy(np.stack([mask for _, _, mask in predictions])),
    }
    file = tmp_path / f"leftImg8bit/val/{STEM}_leftImg8bit.png"
    metric.process({}, [{"img_path": str(file), "pred_instances": found}])
    assert metric.evaluate(size=1) == {"cityscapes/mAP": 0.5, "cityscapes/AP@50": 0.5}
