"""Runs of tools/train_net.py with UPerNet: training, evaluation, refusals."""

import math
import os
import re

import cv2
import numpy as np
import pytest
import torch
from conftest import load_tool
from PIL import Image

pytest.importorskip("detectron2")

from d2_sem_seg_tiny import (
    CONFIGS,
    DIGITS,
    LEAF,
    NAMES,
    TINY,
    entry,
    few_images,
    overrides,
    overwrite,
)
from d2_tiny import NARROW, read_metrics, run_in_process, train_and_resume
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_ade20k
from detectron2.modeling import build_model

from elsa_d2 import load_config
from examples.digits.dataset import SEGMENTATION_CLASSES

pytestmark = pytest.mark.usefixtures("clean_catalog")


@pytest.fixture(scope="module")
def tool():
    return load_tool("train_net")


@pytest.fixture
def copy(digits, tmp_path):
    return few_images(digits, tmp_path)


@pytest.fixture
def ade20k(digits, tmp_path):
    """2 + 2 digits images as Detectron2 wants ADE20K, under its names, labels less one."""
    root = tmp_path / "ADEChallengeData2016"
    for part in ("training", "validation"):
        images, maps = root / "images" / part, root / "annotations_detectron2" / part
        images.mkdir(parents=True)
        maps.mkdir(parents=True)
        for file in sorted((digits / "annotations" / part).glob("*.png"))[:2]:
            (images / f"{file.stem}.jpg").symlink_to(digits / "images" / part / f"{file.stem}.jpg")
            labels = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
            cv2.imwrite(str(maps / file.name), labels - np.uint8(1))
    for folder in (tmp_path, os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))):
        for name in ("ade20k_sem_seg_train", "ade20k_sem_seg_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_all_ade20k(str(folder))
        if folder is tmp_path:
            yield root


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["swin_s", "volo_d2"])
def test_a_leaf_trains_evaluates_saves_and_resumes(ade20k, tmp_path, tool, monkeypatch, variant):
    """The leaf, narrow and on images of 48x32 pixels: an iteration, after --resume another one."""
    output = tmp_path / "out"
    keys = {**TINY, "OUTPUT_DIR": str(output), "INPUT.SEM_SEG.SCALE": [48, 32], **NARROW}
    pairs = [str(part) for pair in keys.items() for part in pair]
    arguments = ["--config-file", LEAF.format(variant), *pairs]
    training, *evaluations = train_and_resume(tool, monkeypatch, output, *arguments)
    resumed = evaluations.pop(1)
    assert math.isfinite(training["loss_sem_seg"]) and training["loss_sem_seg_aux"] > 0
    assert training["lr"] == pytest.approx(6e-5 * 1e-6)
    assert resumed["lr"] == pytest.approx(6e-5 * 0.5 * (1e-6 + (1 - 1e-6) / 1500))
    scores = [evaluation["sem_seg/mIoU"] for evaluation in evaluations]
    assert 0 <= min(scores) <= max(scores) <= 100
    final = torch.load(output / "model_final.pth", mmap=True)
    assert final["iteration"] == 0
    assert final["model"]["sem_seg_head.predictor.weight"].shape == (150, 16, 1, 1)
    best = torch.load(output / "model_best.pth", mmap=True)["best"]
    assert best == {"metric": "sem_seg/mIoU", "score": max(scores)}


@pytest.mark.slow
def test_evaluation_alone_and_at_several_scales(digits, tmp_path, tool):
    output = tmp_path / "out"
    keys = overrides(
        digits,
        OUTPUT_DIR=str(output),
        SOLVER__MAX_ITER=2,
        TEST__SEM_SEG_RATIOS=[0.5, 1.0],
        TEST__BEST_METRIC="sem_seg/mIoU",
        TEST__AUG__ENABLED=True,
        TEST__AUG__RATIOS=[0.5, 1.0],
    )
    assert tool.main(["--config-file", DIGITS, *keys]) == 0
    metrics = read_metrics(output)[-1]

    def evaluated(*changes, checkpoint="model_final"):
        weights = ["MODEL.WEIGHTS", str(output / f"{checkpoint}.pth")]
        arguments = ["--config-file", DIGITS, "--eval-only", *keys, *weights, *changes]
        return run_in_process(tool, arguments)

    results = evaluated()
    assert set(results) == {"sem_seg", "sem_seg_TTA"}
    for task, values in results.items():
        for name, value in values.items():
            assert value == pytest.approx(metrics[f"{task}/{name}"], nan_ok=True)
    # Both have the same sizes, and no flip.
    assert results["sem_seg"]["mIoU"] == results["sem_seg_TTA"]["mIoU"]
    once = evaluated("TEST.SEM_SEG_RATIOS", "[1.0]", checkpoint="model_best")
    assert once["sem_seg"]["mIoU"] != once["sem_seg_TTA"]["mIoU"]
    assert once["sem_seg_TTA"] == pytest.approx(results["sem_seg_TTA"], nan_ok=True)
    best = torch.load(output / "model_best.pth", mmap=True)
    assert best["best"] == {"metric": "sem_seg/mIoU", "score": metrics["sem_seg/mIoU"]}
    assert (best["iteration"], (output / "last_checkpoint").read_text()) == (1, "model_final.pth")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"SEM_SEG_RATIOS": []}, "TEST.SEM_SEG_RATIOS must be one or more numbers above 0, got"),
        ({"AUG__RATIOS": [1, -0.5]}, r"TEST.AUG.RATIOS must be .* above 0, got \[1, -0.5\]"),
        ({"BEST_METRIC": "mIoU"}, "a metric of sem_seg, such as sem_seg/mIoU, got mIoU"),
        ({"BEST_METRIC": "bbox/AP"}, "a metric of sem_seg, such as sem_seg/mIoU, got bbox/AP"),
    ],
)
def test_wrong_evaluations_are_refused(digits, tmp_path, tool, capfd, changes, message):
    changes = {f"TEST__{key}": value for key, value in changes.items()}
    keys = overrides(digits, OUTPUT_DIR=str(tmp_path / "out"), **changes)
    assert tool.main(["--config-file", DIGITS, *keys]) == 2
    assert re.search(message, capfd.readouterr().err)


def test_weights_for_another_number_of_classes_are_refused(digits, tmp_path, tool, capfd):
    keys = overrides(digits, OUTPUT_DIR=str(tmp_path / "out"))
    torch.save({"model": build_model(load_config(DIGITS, keys)).state_dict()}, tmp_path / "w.pth")
    data = [entry(NAMES[1], digits, "validation", SEGMENTATION_CLASSES + ("eleven",))]
    keys += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "12", "MODEL.SEM_SEG_HEAD.CLASS_WEIGHT", "[]"]
    keys += ["DATASETS.REGISTER_SEM_SEG", str(data), "MODEL.WEIGHTS", str(tmp_path / "w.pth")]
    assert tool.main(["--config-file", DIGITS, "--eval-only", *keys]) == 2
    error = capfd.readouterr().err
    assert "it has 11 classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 12" in error


def test_parts_that_order_their_classes_differently_are_refused(digits, tmp_path, tool, capfd):
    data = [entry("maps", digits, "training")]
    data += [entry("turned_maps", digits, "validation", SEGMENTATION_CLASSES[::-1])]
    changes = {"REGISTER_SEM_SEG": data, "TRAIN": ["maps"], "TEST": ["turned_maps"]}
    changes = {f"DATASETS__{key}": value for key, value in changes.items()}
    keys = overrides(digits, OUTPUT_DIR=str(tmp_path / "out"), **changes)
    assert tool.main(["--config-file", DIGITS, *keys]) == 2
    expected = "class 0 is 'background' in the training data and '9' in data set 'turned_maps'"
    assert expected in capfd.readouterr().err


def mislabel(root):
    file = sorted((root / "annotations/training").iterdir())[1]
    Image.fromarray(np.full((96, 96), 12, dtype=np.uint8)).save(file)


def shrink(root):
    file = sorted((root / "annotations/training").iterdir())[1]
    Image.fromarray(np.ones((9, 9), dtype=np.uint8)).save(file)


def remove(part):
    def spoil(root):
        for file in (root / part).iterdir():
            file.unlink()
        (root / part).rmdir()

    return spoil


SPOILT = {
    "no images": (remove("images/training"), "image folder .*training of data set .* not exist"),
    "no label maps": (remove("annotations/validation"), "label map folder .* does not exist"),
    "a label map is missing": (
        lambda root: sorted((root / "annotations/training").iterdir())[0].unlink(),
        "lacks 1 of 3 label maps, the first is 000000.png|lacks 1 of 3 .* 000001.png",
    ),
    "a broken image": (overwrite("images/training", b"JPEG"), "image .*jpg cannot be read"),
    "a broken label map": (overwrite("annotations/training", b""), "map .*png cannot be read"),
    "a label too many": (mislabel, "must be 1..11 for 11 classes, or 0 or 255 .* got 12 in .*png"),
    "a small label map": (shrink, "as large as its image, got .*png of .9, 9. pixels for .96, 96."),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_spoilt_data_is_refused(copy, tmp_path, tool, capfd, spoil, message):
    spoil(copy)
    keys = overrides(copy, OUTPUT_DIR=str(tmp_path / "out"))
    assert tool.main(["--config-file", DIGITS, *keys]) == 2
    # Alone but for the log, whose stream an earlier test may have closed.
    lines = capfd.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("train_net: ")]
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


def test_another_number_of_classes_is_refused(digits, tmp_path, tool, capfd):
    keys = overrides(digits, MODEL__SEM_SEG_HEAD__NUM_CLASSES=10, OUTPUT_DIR=str(tmp_path / "out"))
    keys += ["MODEL.SEM_SEG_HEAD.CLASS_WEIGHT", "[]"]
    assert tool.main(["--config-file", DIGITS, *keys]) == 2
    assert "has 11 classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 10" in capfd.readouterr().err


def test_data_sets_and_models_of_different_kinds_are_refused(digits, tmp_path, tool, capfd):
    coco = ["x", f"{digits}/annotations/instances_training.json", f"{digits}/images/training"]
    output = {"OUTPUT_DIR": str(tmp_path / "out")}
    keys = overrides(digits, DATASETS__REGISTER_COCO=[coco], DATASETS__TRAIN=["x"], **output)
    assert tool.main(["--config-file", DIGITS, *keys]) == 2
    assert "data set 'x' has no label maps" in capfd.readouterr().err
    detector = str(CONFIGS / "digits/mask_rcnn_elsa_swin_digits.yaml")
    no_coco = {"DATASETS__REGISTER_COCO": []}
    keys = overrides(digits, DATASETS__TRAIN=[NAMES[0]], **no_coco, **output)
    assert tool.main(["--config-file", detector, *keys]) == 2
    assert "has label maps, which GeneralizedRCNN cannot use" in capfd.readouterr().err


def test_missing_ade20k_says_how_to_make_it(ade20k, tmp_path, tool, capfd):
    remove("annotations_detectron2/validation")(ade20k)
    keys = [str(part) for pair in TINY.items() for part in pair]
    arguments = ["--config-file", LEAF.format("swin_t"), *keys, "OUTPUT_DIR", str(tmp_path / "out")]
    assert tool.main(arguments) == 2
    error = capfd.readouterr().err
    assert "annotations_detectron2/validation" in error and "prepare_ade20k_sem_seg.py" in error
