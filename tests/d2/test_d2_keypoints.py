"""Keypoint R-CNN: Detectron2's head on our backbone, with the keypoints of a file in COCO's format.

The keypoints of the digits are the corners and the centre of their boxes.
"""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from conftest import load_tool
from d2_tiny import NARROW, REPOSITORY, datasets, train_and_resume
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
)
from detectron2.structures import Boxes, Instances

from elsa_d2 import DetectionMapper, load_config, register_coco_datasets
from elsa_d2.data.keypoints import set_keypoint_names
from elsa_d2.data.mapper import training_dicts
from elsa_d2.evaluation.coco import COCOEvaluator

LEAF = REPOSITORY / "configs/detectron2/COCO-Keypoints/keypoint_rcnn_elsa_swin_t_fpn_1x.yaml"
NAMES = ["left_top", "right_top", "right_bottom", "left_bottom", "centre"]
SIGMAS = [0.05] * len(NAMES)


def corners(data, folder):
    """The digits' data sets with keypoints, as REGISTER_COCO has them; one category."""
    entries = []
    for name, file, images in datasets(data):
        coco = json.loads(open(file).read())
        coco["categories"] = [{"id": 1, "name": "digit", "keypoints": NAMES}]
        for one in coco["annotations"]:
            one["category_id"] = 1
            x, y, w, h = one["bbox"]
            points = [(x, y), (x + w - 1, y), (x + w - 1, y + h - 1), (x, y + h - 1)]
            points.append((x + (w - 1) / 2, y + (h - 1) / 2))
            one["keypoints"] = [value for point in points for value in (*point, 2)]
        # One that nobody has marked.
        del coco["annotations"][0]["keypoints"]
        file = folder / f"{name}.json"
        file.write_text(json.dumps(coco))
        entries.append([f"corners_{name}", str(file), images])
    return entries


@pytest.fixture(scope="module")
def entries(digits, tmp_path_factory):
    return corners(digits, tmp_path_factory.mktemp("keypoints"))


def overrides(entries, output, **changes):
    keys = {
        **NARROW,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16],
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": len(NAMES),
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
        "MODEL.DEVICE": "cpu",
        "TEST.KEYPOINT_OKS_SIGMAS": SIGMAS,
        "DATASETS.REGISTER_COCO": entries,
        "DATASETS.TRAIN": [entries[0][0]],
        "DATASETS.TEST": [entries[1][0]],
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": [64, 96],
        "INPUT.MIN_SIZE_TEST": 64,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.STEPS": [],
        "OUTPUT_DIR": output,
    }
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return [str(part) for pair in keys.items() for part in pair]


def test_coco_gets_its_own_flip_map(clean_catalog):
    category = {"name": "person", "keypoints": list(COCO_PERSON_KEYPOINT_NAMES)}
    set_keypoint_names("people", {"categories": [{"name": "none"}, category]})
    metadata = MetadataCatalog.get("people")
    assert metadata.keypoint_names == list(COCO_PERSON_KEYPOINT_NAMES)
    assert metadata.keypoint_flip_map == list(COCO_PERSON_KEYPOINT_FLIP_MAP)


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["ours", "stock"])
def test_a_shrunk_leaf_trains_evaluates_saves_and_resumes(entries, tmp_path, monkeypatch, heads):
    changes = {"TEST__BEST_METRIC": "keypoints/AP"}
    if heads == "stock":
        changes |= {"MODEL__ROI_HEADS__NAME": "StandardROIHeads"}
        changes |= {"MODEL__ROI_BOX_HEAD__NAME": "FastRCNNConvFCHead"}
        changes |= {"MODEL__PROPOSAL_GENERATOR__NAME": "RPN", "SOLVER__AMP__ENABLED": False}
        changes |= {"MODEL__ANCHOR_GENERATOR__NAME": "DefaultAnchorGenerator"}
    keys = overrides(entries, tmp_path, **changes)
    tool = load_tool("train_net")
    metrics = train_and_resume(tool, monkeypatch, tmp_path, "--config-file", str(LEAF), *keys)
    assert metrics[0]["loss_keypoint"] > 0 and 0 <= metrics[1]["keypoints/AP"] <= 100
    assert "segm/AP" not in metrics[1] and (tmp_path / "model_best.pth").exists()
    results = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    assert {len(one["keypoints"]) for one in results} == {3 * len(NAMES)}


def test_mirrored_images_exchange_left_and_right(entries, tmp_path, clean_catalog):
    keys = overrides(entries, tmp_path, INPUT__MIN_SIZE_TRAIN=[64])
    cfg = load_config(str(LEAF), keys)
    register_coco_datasets(cfg)
    record = next(one for one in training_dicts(cfg) if len(one["annotations"]) > 1)
    mapper = DetectionMapper(cfg, True)
    seen = set()
    for seed in range(6):
        np.random.seed(seed)
        found = mapper(record)["instances"]
        boxes, points = found.gt_boxes.tensor, found.gt_keypoints.tensor
        for box, (a, b, c, d, centre) in zip(boxes, points, strict=True):
            if not centre[2]:  # the one that nobody has marked
                continue
            # Half a pixel inside the box, in the image's own pixels, whichever side is left.
            assert torch.allclose(a[:2], box[:2], atol=0.6) and torch.allclose(
                c[:2], box[2:], atol=0.6
            )
            assert b[0] == c[0] and d[0] == a[0] and a[1] == b[1]
        seen.add(float(boxes[0, 0]))
    assert len(seen) == 2  # some were mirrored


@pytest.mark.parametrize("shift, ap", [(0, 100), (200, 0), (None, 0)])
def test_oks_of_perfect_wrong_and_no_predictions(entries, tmp_path, clean_catalog, shift, ap):
    register_coco_datasets(load_config(str(LEAF), overrides(entries, tmp_path)))
    name, file, _ = entries[1]
    coco = json.loads(open(file).read())
    DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, ["bbox", "keypoints"], 200, kpt_oks_sigmas=SIGMAS)
    evaluator.reset()
    for image in coco["images"]:
        found = [one for one in coco["annotations"] if one["image_id"] == image["id"]]
        found = [one for one in found if "keypoints" in one] * (shift is not None)
        instances = Instances((image["height"], image["width"]))
        x, y, w, h = torch.tensor([one["bbox"] for one in found]).reshape(-1, 4).unbind(1)
        instances.pred_boxes = Boxes(torch.stack([x, y, x + w, y + h], 1))
        instances.scores = torch.ones(len(found))
        instances.pred_classes = torch.zeros(len(found), dtype=torch.int64)
        points = torch.tensor([one["keypoints"] for one in found]).reshape(-1, len(NAMES), 3)
        # Positions, half a pixel from the file's indices.
        instances.pred_keypoints = points.float() + torch.tensor([0.5 + (shift or 0), 0.5, 0])
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    assert evaluator.evaluate()["keypoints"]["AP"] == pytest.approx(ap)


REFUSALS = {
    "number": (
        {"MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": 17},
        "has 5 keypoints, but MODEL.ROI_KEY",
    ),
    "sigmas": (
        {"TEST__KEYPOINT_OKS_SIGMAS": []},
        "a number for each of the 5 keypoints, got 17 of",
    ),
    "other sigmas": ({"TEST__KEYPOINT_OKS_SIGMAS": [0.1]}, "each of the 5 keypoints, got 1"),
    "names": ("names", "needs the names of the keypoints of data set"),
    "length": ("length", "annotation 2 must have 5 keypoints [x, y, visibility], got 6 numbers"),
}


@pytest.mark.parametrize("changes, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals(digits, tmp_path, capfd, clean_catalog, changes, message):
    entries = corners(digits, tmp_path)
    entries = [[f"refused_{name}", *place] for name, *place in entries]
    if isinstance(changes, str):
        coco = json.loads(open(entries[0][1]).read())
        if changes == "names":
            del coco["categories"][0]["keypoints"]
        else:
            coco["annotations"][1]["keypoints"] = [1, 1, 2] * 2
        open(entries[0][1], "w").write(json.dumps(coco))
        changes = {}
    keys = overrides(entries, tmp_path / "out", **changes)
    assert load_tool("train_net").main(["--config-file", str(LEAF), *keys]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()
