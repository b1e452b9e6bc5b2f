"""A trained model evaluated in both frameworks, from files of many sizes and kinds on: one by one
the same detections, and the same average precision.
"""

import json
import pickle
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from mmengine.config import Config
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from trained_digits import ARCH, CHECKPOINT, WIDTH

import elsa_d2
from elsa_core.weights import convert_file
from elsa_mm import cli
from elsa_tools.verify.compare import Outcome, match
from examples.digits.layouts import make_layout

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = str(REPOSITORY / "configs/detectron2/digits/mask_rcnn_elsa_swin_digits.yaml")
MM_CONFIG = str(REPOSITORY / "configs/mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py")
MM_ARCH = {
    "backbone.arch.embed_dim": 16,
    "backbone.arch.depths": [1, 1, 1, 1],
    "neck.in_channels": [16, 32, 64, 128],
    "neck.out_channels": WIDTH,
    "rpn_head.in_channels": WIDTH,
    "rpn_head.feat_channels": WIDTH,
    "roi_head.bbox_roi_extractor.out_channels": WIDTH,
    "roi_head.bbox_head.in_channels": WIDTH,
    "roi_head.bbox_head.fc_out_channels": WIDTH,
    "roi_head.mask_roi_extractor.out_channels": WIDTH,
    "roi_head.mask_head.in_channels": WIDTH,
    "roi_head.mask_head.conv_out_channels": WIDTH,
}
NAMES = {"AP": "mAP", "AP50": "mAP_50", "AP75": "mAP_75"}
NAMES |= {f"AP{area}": f"mAP_{area}" for area in "sml"}
PROPOSALS, LEAST_SCORE = 400, 0.03


class Found(NamedTuple):
    """In an image, best first: boxes [N, 4] as corners, scores [N], labels [N], N run lengths."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "data"
    return make_layout("mixed", folder, train=1, val=40, size=256, seed=0, progress=False).path


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "mmdet.pth"
    convert_file(CHECKPOINT, path, "mmdet", anchor_sizes=2)
    return path


def in_detectron2(data, limit, out):
    """Metrics in percent by task and name, and what is found by image id."""
    name = out.name
    keys = {
        **ARCH,
        "MODEL.DEVICE": "cpu",
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": PROPOSALS,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": LEAST_SCORE,
        "TEST.DETECTIONS_PER_IMAGE": limit,
        "DATASETS.REGISTER_COCO": [[name, *places(data)]],
        "DATASETS.TRAIN": [name],
        "DATASETS.TEST": [name],
        "OUTPUT_DIR": str(out),
    }
    cfg = elsa_d2.load_config(CONFIG, [str(part) for pair in keys.items() for part in pair])
    elsa_d2.register_coco_datasets(cfg)
    model = elsa_d2.Trainer.build_model(cfg)
    elsa_d2.AtomicCheckpointer(model).load(str(CHECKPOINT))
    scores = elsa_d2.Trainer.test(cfg, model)
    found = {}
    for one in torch.load(out / "inference/instances_predictions.pth", weights_only=False):
        parts = [[each[key] for each in one["instances"]] for key in KEYS]
        boxes, labels = np.array(parts[0]).reshape(-1, 4), np.array(parts[2])
        boxes[:, 2:] += boxes[:, :2]
        found[one["image_id"]] = Found(boxes, np.array(parts[1]), labels, parts[3])
    return {task: {name: scores[task][name] for name in NAMES} for task in scores}, found


KEYS = ("bbox", "score", "category_id", "segmentation")


def places(data):
    return f"{data}/annotations/instances_validation.json", f"{data}/images/validation"


def in_mmdetection(data, limit, out, checkpoint):
    """As in Detectron2."""
    options = {f"{part}_dataloader.dataset.data_root": data for part in ("train", "val", "test")}
    options |= {f"model.{name}": value for name, value in MM_ARCH.items()}
    options |= {
        "test_evaluator.ann_file": places(data)[0],
        "model.test_cfg.rpn.nms_pre": 1000,
        "model.test_cfg.rpn.max_per_img": PROPOSALS,
        "model.test_cfg.rcnn.score_thr": LEAST_SCORE,
        "model.test_cfg.rcnn.max_per_img": limit,
    }
    overrides = [f"{name}={value}".replace(" ", "") for name, value in options.items()]
    files = ["--work-dir", str(out), "--out", str(out / "found.pkl")]
    assert cli.test([MM_CONFIG, str(checkpoint), *files, "--cfg-options", *overrides]) == 0
    (log,) = out.glob("*/*.json")
    scores = json.loads(log.read_text())
    found = {}
    for one in pickle.loads((out / "found.pkl").read_bytes()):
        part = one["pred_instances"]
        arrays = (part[key].double().numpy() for key in ("bboxes", "scores"))
        found[one["img_id"]] = Found(*arrays, part["labels"].numpy(), part["masks"])
    metrics = {
        task: {name: scores[f"coco/{task}_{key}"] for name, key in NAMES.items()}
        for task in ("bbox", "segm")
    }
    return metrics, found


def assert_same_scores(ours, theirs):
    """In every metric, where there are such objects."""
    for task, scores in ours.items():
        for name, score in scores.items():
            other = theirs[task][name]
            assert np.isnan(score) if other == -1 else score / 100 == pytest.approx(other, abs=1e-4)


def assert_same_detections(ours, theirs):
    """One to one: of the same class, with the same score, box and mask."""
    assert len(ours.boxes) == len(theirs.boxes)
    outcomes = [
        Outcome({}, boxes=torch.from_numpy(one.boxes), labels=torch.from_numpy(one.labels))
        for one in (ours, theirs)
    ]
    pairs = match(*outcomes)
    assert len(pairs) == len(ours.boxes)
    first, second = np.array(pairs).reshape(-1, 2).T
    np.testing.assert_allclose(ours.scores[first], theirs.scores[second], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.boxes[first], theirs.boxes[second], rtol=0, atol=1e-3)
    areas = [coco_mask.area(one.masks) for one in (ours, theirs)]
    both = [
        coco_mask.area(coco_mask.merge([ours.masks[i], theirs.masks[j]], True)) for i, j in pairs
    ]
    different = areas[0][first] + areas[1][second] - 2 * np.array(both, int)
    assert different.max() <= 2  # a box of which one edge is rounded to the other side of a pixel


@pytest.mark.parametrize("limit", [100, 400])
def test_mixed_images(mixed, converted, limit, tmp_path):
    ours, found = in_detectron2(mixed, limit, tmp_path / f"mixed_{limit}")
    theirs, others = in_mmdetection(mixed, limit, tmp_path / "mmdet", converted)
    assert Config.fromfile(MM_CONFIG).test_dataloader.batch_size == 1  # as in Detectron2
    assert_same_scores(ours, theirs)
    assert min(ours["segm"].values()) > 0.02 and ours["segm"]["APl"] > 60
    assert found.keys() == others.keys() and len(found) == 40
    for image in found:
        assert_same_detections(found[image], others[image])
    numbers = [len(one.boxes) for one in found.values()]
    assert (max(numbers) > 100) == (limit == 400) and max(numbers) >= 100
    assert min(numbers) > 5


def as_grey(mixed, out, first_id=1, bits=8):
    """The first images that are no crowds, as grey PNG."""
    file = "annotations/instances_validation.json"
    coco = json.loads((mixed / file).read_text())
    coco["images"] = [one for one in coco["images"] if one["width"] != one["height"]][:8]
    kept = {image["id"] for image in coco["images"]}
    coco["annotations"] = [one for one in coco["annotations"] if one["image_id"] in kept]
    for number, one in enumerate(coco["annotations"], start=first_id):
        one["id"] = number
    for name in ("annotations", "images/validation"):
        (out / name).mkdir(parents=True)
    for image in coco["images"]:
        name = Path("images/validation", image["file_name"])
        with Image.open(mixed / name) as picture:
            rgb = ImageOps.exif_transpose(picture).convert("RGB")
        grey = np.asarray(rgb.convert("L"))
        image["file_name"] = f"{name.stem}.png"
        pixels = grey if bits == 8 else grey.astype(np.uint16) * 257
        Image.fromarray(pixels).save(out / name.with_suffix(".png"))
    (out / file).write_text(json.dumps(coco))
    return out


def both(data, converted, out):
    """The metrics of each framework."""
    return (
        in_detectron2(data, 100, out / uuid.uuid4().hex)[0],
        in_mmdetection(data, 100, out / "mmdet", converted)[0],
    )


@pytest.fixture(scope="module")
def grey_scores(mixed, converted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grey")
    return both(as_grey(mixed, folder / "data"), converted, folder)


@pytest.mark.parametrize("change", [{"first_id": 0}, {"bits": 16}], ids=str)
def test_ids_from_0_and_16_bits_change_no_score(mixed, converted, change, grey_scores, tmp_path):
    scores = both(as_grey(mixed, tmp_path / "data", **change), converted, tmp_path)
    np.testing.assert_equal(scores, grey_scores)
    assert_same_scores(*scores)
    assert scores[0]["bbox"]["AP"] > 30
