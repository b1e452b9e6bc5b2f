"""Damaged data with tools/train_net.py: one sentence that names the file, status 2."""

import shutil
import uuid

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

import d2_sem_seg_tiny
import d2_tiny
import torch
from conftest import load_tool
from damage import CONTRADICTIONS, cut_all, edit, end_workers, no_images, shrink
from detectron2.modeling import build_model
from torch.multiprocessing.spawn import ProcessRaisedException

from elsa_core.runtime.errors import DamagedFileError, UsageError, sentence_in
from elsa_d2 import load_config

pytestmark = pytest.mark.usefixtures("clean_catalog")


@pytest.fixture(autouse=True)
def no_workers_left():
    yield
    end_workers()


@pytest.fixture(scope="module")
def tool():
    return load_tool("train_net")


@pytest.fixture
def refusal(tool, tmp_path, capfd):
    """Runs the tool, which must end with status 2; returns its last line."""

    def run(config, keys, *flags):
        capfd.readouterr()
        output = str(tmp_path / f"out_{uuid.uuid4().hex}")
        arguments = ["--config-file", config, *flags, *keys, "OUTPUT_DIR", output]
        assert tool.main(arguments) == 2
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("train_net: ")
        return line.removeprefix("train_net: ")

    return run


def detect(refusal, root, *flags, **changes):
    keys = d2_tiny.overrides(root, MODEL__DEVICE="cpu", SOLVER__MAX_ITER=2, **changes)
    return refusal(d2_tiny.CONFIG, keys, *flags)


@pytest.mark.parametrize(
    "spoil, workers, words",
    [
        (cut_all, 0, "image {} cannot be read: "),
        (no_images, 0, "image {} cannot be read: is no image of a known kind"),
        (no_images, 1, "image {} cannot be read: is no image of a known kind"),
        (shrink, 0, "Mismatched image shape for image {}, got (40, 50), expect (96, 96)."),
    ],
)
def test_an_image_that_training_meets(refusal, copy, spoil, workers, words):
    spoil(copy / "images/training")
    sentence = detect(refusal, copy, DATALOADER__NUM_WORKERS=workers)
    names = [str(file) for file in (copy / "images/training").iterdir()]
    assert any(sentence.startswith(words.format(name)) for name in names), sentence


def test_an_image_that_an_evaluation_meets(refusal, copy, tmp_path):
    cut_all(copy / "images/validation")
    weights = tmp_path / "weights.pth"
    cfg = load_config(d2_tiny.CONFIG, d2_tiny.overrides(copy, MODEL__DEVICE="cpu"))
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    changes = {"MODEL__WEIGHTS": str(weights), "DATALOADER__NUM_WORKERS": 1}
    sentence = detect(refusal, copy, "--eval-only", **changes)
    assert sentence.startswith(f"image {copy}/images/validation/0")
    assert "cannot be read: " in sentence


@pytest.mark.parametrize("change, problem", CONTRADICTIONS)
def test_annotations_that_contradict_themselves(refusal, copy, change, problem):
    file = edit(copy, "training", change)
    sentence = detect(refusal, copy)
    assert sentence.startswith(f"annotation file {file} of data set 'digits_training': ")
    assert sentence.endswith(problem.format("MODEL.MASK_ON False"))


def test_masks_that_cannot_be_used(refusal, copy):
    def change(content):
        for one in content["annotations"]:
            one["segmentation"] = {"size": [96, 96], "counts": [96 * 96]}

    edit(copy, "training", change)
    sentence = detect(refusal, copy, INPUT__MASK_FORMAT="polygon")
    assert sentence.startswith(f"the annotations of image {copy}/images/training/"), sentence


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "folder, content, words",
    [
        ("images/training", b"<html>", "image {} cannot be read: "),
        ("annotations/training", None, "for 11 classes, or 0 or 255 for none, got 12 in {}"),
    ],
)
def test_what_a_segmentor_meets_in_training(refusal, copy, workers, folder, content, words):
    """In a file that is not among those read before the run."""
    for part in ("images", "annotations"):
        files = sorted((copy / part / "training").iterdir())
        for number in range(16, 64):  # more than are read before the run
            file = files[number % 16]
            shutil.copy(file, file.with_name(f"{number:06d}{file.suffix}"))
    for number, file in enumerate(sorted((copy / folder).iterdir())):
        if number % 2:
            label_map = Image.fromarray(np.full((96, 96), 12, dtype=np.uint8))
            label_map.save(file) if content is None else file.write_bytes(content)
    keys = d2_sem_seg_tiny.overrides(
        copy, SOLVER__MAX_ITER=8, SOLVER__IMS_PER_BATCH=4, DATALOADER__NUM_WORKERS=workers
    )
    sentence = refusal(d2_sem_seg_tiny.DIGITS, keys)
    names = [str(file) for file in (copy / folder).iterdir()]
    assert any(words.format(name) in sentence for name in names), sentence


@pytest.mark.parametrize("known", [True, False])
def test_the_sentence_of_a_process_that_was_launched(
    tool, digits, tmp_path, monkeypatch, capfd, known
):
    trace = "\n\n-- Process 1 terminated with the following error:\nTraceback ...\n"
    trace += (
        "elsa_core.runtime.errors.DamagedFileError: image a cannot be read\n"
        if known
        else "OSError"
    )

    def launch(*arguments, **options):
        raise ProcessRaisedException(trace, 1, 2)

    monkeypatch.setattr("elsa_d2.engine.command.launch", launch)
    keys = d2_tiny.overrides(digits, MODEL__DEVICE="cpu", OUTPUT_DIR=str(tmp_path))
    if known:
        assert tool.main(["--config-file", d2_tiny.CONFIG, *keys]) == 2
        assert capfd.readouterr().err.splitlines()[-1] == "train_net: image a cannot be read"
    else:
        with pytest.raises(ProcessRaisedException):
            tool.main(["--config-file", d2_tiny.CONFIG, *keys])


def test_the_sentence_of_another_process():
    text = (
        "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "OSError: no\n\nThe above exception ...:\n\n"
        "elsa_core.runtime.errors.{0}: image a cannot be read\n"
    )
    for kind in (UsageError, DamagedFileError):
        error = kind(text.format(kind.__name__))
        assert str(error) == sentence_in(str(error)) or str(error) == "image a cannot be read"
        assert str(kind("image a: b")) == "image a: b"
    assert sentence_in("Traceback\nOSError: no") is None
