"""tools/demo.py: pictures and results of both frameworks, from images and videos."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from digit_models import DET, DIGITS, SEG, save_untrained
from PIL import Image
from pycocotools import mask as coco

import elsa_core.weights
from elsa_core.runtime.errors import UsageError
from elsa_tools.predict import Detections, Segmentation, load_inferencer
from elsa_tools.predict.cli import main
from elsa_tools.predict.inputs import find_inputs, read_image
from elsa_tools.predict.outputs import Names, image_ending
from elsa_tools.predict.results import enlarge, palette

# Random weights score every class about 1 / 11.
LOW = {
    "detectron2": ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"],
    "mmdet": ["model.test_cfg.rcnn.score_thr=0.0"],
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a detector, for each framework, and of a segmentor, which Detectron2 converts."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {
        "detection": save_untrained(DET["mmdet"], folder / "detection.pth"),
        "segmentation": save_untrained(SEG["mmseg"], folder / "segmentation.pth"),
    }
    # With two sizes of anchors at a position, which a checkpoint does not tell.
    paths["detectron2"] = str(folder / "detectron2.pth")
    elsa_core.weights.convert_file(
        paths["detection"], paths["detectron2"], "detectron2", anchor_sizes=2
    )
    paths["mmdet"] = paths["detection"]
    return paths


@pytest.fixture
def images(digits):
    return sorted((digits / "images/validation").glob("*.jpg"))[:2]


def demo(model, weights, out, *arguments):
    """Runs the command; returns its exit status and the content of results.json."""
    config = DET[model] if model in weights else SEG[model.removesuffix(" segmentor")]
    arguments = [*map(str, arguments), "--config", config, "--out", str(out), "--device", "cpu"]
    status = main([*arguments, "--weights", weights.get(model, weights["segmentation"])])
    return status, json.loads((out / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("framework", DET)
def test_detections_are_drawn_and_recorded(framework, weights, images, tmp_path):
    out = tmp_path / "out"
    options = ["--score-threshold", "0.1", "--opts", *LOW[framework]]
    status, record = demo(framework, weights, out, *images, *options)
    assert status == 0
    assert (record["framework"], record["task"]) == (framework, "detection")
    assert record["classes"] == DIGITS and record["failed"] == []
    assert record["time"]["images"] == 2
    assert 0 < record["time"]["model_ms"] < record["time"]["image_ms"]
    assert [entry["file"] for entry in record["images"]] == list(map(str, images))
    for entry, path in zip(record["images"], images, strict=True):
        picture = cv2.imread(str(out / entry["picture"]))
        before = cv2.resize(cv2.imread(str(path)), picture.shape[1::-1])
        assert picture.shape == (480, 480, 3)  # five times as large as the image
        assert np.abs(picture.astype(int) - before).max() > 100
        assert entry["instances"]
        scores = [instance["score"] for instance in entry["instances"]]
        assert scores == sorted(scores, reverse=True) and scores[-1] >= 0.1
        for instance in entry["instances"]:
            assert instance["class"] == DIGITS[instance["id"]]
            x1, y1, x2, y2 = instance["box"]
            assert 0 <= x1 < x2 <= 96 and 0 <= y1 < y2 <= 96
            assert coco.decode(instance["mask"]).shape == (96, 96)


@pytest.mark.slow
@pytest.mark.parametrize("framework", SEG)
def test_segmentations_are_drawn_and_recorded(framework, weights, images, tmp_path):
    out = tmp_path / "out"
    status, record = demo(f"{framework} segmentor", weights, out, images[0])
    assert status == 0
    assert (record["framework"], record["task"]) == (framework, "segmentation")
    assert record["classes"] == ["background", *DIGITS]
    (entry,) = record["images"]
    classes = entry["segmentation"]["classes"]
    labels = cv2.imread(str(out / entry["segmentation"]["label_map"]), cv2.IMREAD_UNCHANGED)
    assert labels.shape == (96, 96)
    numbers, pixels = np.unique(labels, return_counts=True)
    expected = dict(zip(numbers.tolist(), pixels.tolist(), strict=True))
    assert {one["id"]: one["pixels"] for one in classes} == expected
    picture = cv2.imread(str(out / entry["picture"]))
    before = cv2.resize(cv2.imread(str(images[0])), picture.shape[1::-1])
    assert np.abs(picture.astype(int) - before).mean() > 5


@pytest.fixture(scope="module")
def video(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "digits.avi"
    code = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), code, 10, (96, 96))
    assert writer.isOpened()
    for name in sorted((digits / "images/validation").glob("*.jpg"))[:3]:
        writer.write(cv2.imread(str(name)))
    writer.release()
    return path


@pytest.mark.slow
def test_a_video_becomes_a_video(weights, video, tmp_path):
    out = tmp_path / "out"
    status, record = demo("mmseg", weights, out, video)
    (entry,) = record["videos"]
    assert status == 0
    assert (entry["width"], entry["height"], entry["rate"]) == (96, 96, 10)
    assert [frame["frame"] for frame in entry["frames"]] == [0, 1, 2]
    for frame in entry["frames"]:
        pixels = [one["pixels"] for one in frame["segmentation"]["classes"]]
        assert sum(pixels) == 96 * 96
    capture = cv2.VideoCapture(str(out / entry["picture"]))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    good, frame = capture.read()
    assert good and frame.shape == (480, 480, 3)
    assert sorted(path.name for path in out.iterdir()) == ["digits.mp4", "results.json"]


def test_broken_inputs_are_named_and_the_others_done(weights, images, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    content = images[0].read_bytes()
    (folder / "whole.jpg").write_bytes(content)
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("is no input")
    status, record = demo("mmseg", weights, out, folder)
    assert status == 1
    assert [Path(entry["file"]).name for entry in record["images"]] == ["whole.jpg"]
    failed = [Path(entry["file"]).name for entry in record["failed"]]
    assert failed == ["cut.jpg", "empty.mp4", "text.png"]
    errors = capsys.readouterr().err
    assert all(f"{folder / name} cannot be read" in errors for name in failed)
    assert {path.name for path in out.iterdir()} == {
        "whole.jpg",
        "whole_labels.png",
        "results.json",
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", ["detectron2", "mmdet", "mmseg"])
def test_an_odd_image_does_not_end_a_run(model, weights, images, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    picture = Image.open(images[0])
    sizes = {"a": (96, 96), "dot": (1, 1), "needle": (30_000, 4), "long": (3000, 20)}
    sizes |= {"high": (20, 3000), "thin": (4000, 2), "z": (96, 96)}
    for name, size in sizes.items():
        picture.resize(size).save(folder / f"{name}.png")
    unwritable = struct.pack("<HHHIIHHIII", 2, 0x112, 3, 1, 6, 0x11A, 10, 1, 38, 0)
    unwritable += struct.pack("<ii", -1, 0)  # a fraction that Pillow cannot write back
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + unwritable
    picture.save(folder / "turned.jpg", exif=exif)
    (folder / ("x" * 250 + ".png")).write_bytes((folder / "a.png").read_bytes())
    status, record = demo(model, weights, out, folder)
    done = {Path(entry["file"]).stem: entry["picture"] for entry in record["images"]}
    failed = {Path(entry["file"]).stem: entry["reason"] for entry in record["failed"]}
    assert done.keys() | failed.keys() == {*sizes, "turned", "x" * 250} and status == bool(failed)
    assert {"a", "long", "high", "turned", "z", "x" * 250} <= done.keys()
    for name, reason in failed.items():
        assert f"{name}.png cannot be processed: the config's resize leaves nothing of" in reason
    for name, file in done.items():
        width, height = Image.open(out / file).size
        assert max(width, height) <= max(4000, *sizes.get(name, (96, 96)))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["detectron2", "mmdet", "mmseg"])
def test_large_images_take_bounded_memory(model, weights, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("elsa_tools.predict.inferencer.MOST_PAINTED", 800 * 600)
    Image.open(images[0]).resize((1600, 1200)).save(tmp_path / "a.png")
    out = tmp_path / "out"
    options = ["--score-threshold", "0.1", *(["--opts", *LOW[model]] if model in LOW else [])]
    status, record = demo(model, weights, out, tmp_path / "a.png", *options)
    assert status == 0
    assert "its 1600x1200 pixels are predicted and painted at 800x600" in capsys.readouterr().err
    (entry,) = record["images"]
    assert (entry["width"], entry["height"]) == (1600, 1200)
    assert Image.open(out / entry["picture"]).size == (800, 600)
    if model == "mmseg":
        label_map = Image.open(out / entry["segmentation"]["label_map"])
        assert label_map.size == (1600, 1200)
        return
    assert max(instance["box"][2] for instance in entry["instances"]) > 800
    for instance in entry["instances"]:
        mask = coco.decode(instance["mask"])
        assert mask.shape == (1200, 1600)
        columns = np.flatnonzero(mask.any(axis=0))
        x1, _, x2, _ = instance["box"]
        assert not len(columns) or x1 - 4 <= columns[0] <= columns[-1] <= x2 + 4


WAYS = ["folder", "file", "link to the folder", "link to the file", "link to a link", "annotations"]


@pytest.mark.parametrize("way", WAYS)
def test_inputs_are_never_replaced(way, weights, images, tmp_path, capsys):
    folder, given, out = tmp_path / "in", tmp_path / "in", tmp_path / "in"
    folder.mkdir()
    content = images[0].read_bytes()
    (folder / "a.jpg").write_bytes(content)
    if way == "file":
        Image.open(folder / "a.jpg").save(folder / "a.png")
        given = folder / "a.png"  # whose picture would be a.jpg
    elif way == "link to the folder":
        out = tmp_path / "link"
        out.symlink_to(folder)
    elif way == "link to the file":
        given = tmp_path / "b.jpg"
        given.symlink_to(folder / "a.jpg")
    elif way == "link to a link":
        (tmp_path / "a.jpg").write_bytes(content)
        (folder / "a.jpg").unlink()
        (folder / "a.jpg").symlink_to(tmp_path / "a.jpg")  # which the result would replace
        given = tmp_path / "b.jpg"
        given.symlink_to(folder / "a.jpg")
    elif way == "annotations":
        given = images[0]
        (folder / "coco_results.json").touch()
    before = sorted(folder.iterdir())
    arguments = ["--coco", str(folder / "coco_results.json")] if way == "annotations" else []
    arguments += [str(given), "--config", SEG["mmseg"], "--weights", weights["segmentation"]]
    assert "another folder than that of the inputs" in refused(
        [*arguments, "--out", str(out)], capsys
    )
    assert sorted(folder.iterdir()) == before and (folder / "a.jpg").read_bytes() == content


def test_a_side_that_no_jpeg_has_makes_a_png():
    sizes = [(1, 65500), (1, 65501)]
    assert [image_ending(np.zeros((*size, 3), np.uint8)) for size in sizes] == [".jpg", ".png"]


def test_names_of_outputs_are_given_once():
    names = Names()
    inputs = ["a.jpg", "b/a.png", "a_labels.png", "a_2.jpg", "é" * 120 + ".jpg"]
    stems = [names.stem(path) for path in inputs]
    assert stems == ["a", "a_2", "a_labels_2", "a_2_2", "é" * 100]


def refused(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("demo: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"inputs": "missing.jpg"}, "missing.jpg is neither a file, nor a folder"),
        ({"inputs": "."}, "no image and no video found in ."),
        ({"--config": "configs/mmdet/nothing.py"}, "there is no config mmdet/nothing.py"),
        ({"--config": "model.txt"}, "must be a .yaml or a .py file"),
        ({"--weights": "missing.pth"}, "the checkpoint missing.pth does not exist"),
        ({"--score-threshold": "2"}, "must be in [0, 1], got 2.0"),
        ({"--device": "toaster"}, "--device toaster is not a device"),
        ({"--opts": "model"}, "must be KEY=VALUE, got model"),
        ({"--weights": "detection"}, "does not match the model"),
    ],
)
def test_bad_use_is_one_sentence(change, sentence, weights, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"inputs": str(images[0]), "--config": SEG["mmseg"], "--out": "out"}
    values |= {"--weights": weights["segmentation"], "--device": "cpu", **change}
    values["--weights"] = weights.get(values["--weights"], values["--weights"])
    inputs = values.pop("inputs")
    arguments = [inputs, *(part for pair in values.items() for part in pair)]
    assert sentence in refused(arguments, capsys)
    assert not (tmp_path / "out" / "results.json").exists()


def test_unknown_class_names_are_numbers_and_said(weights, tmp_path):
    content = torch.load(weights["segmentation"], weights_only=True)
    content["meta"] = {"dataset_meta": {"classes": ["a", "b"]}}
    torch.save(content, tmp_path / "two.pth")
    inferencer = load_inferencer(SEG["mmseg"], str(tmp_path / "two.pth"), device="cpu")
    assert inferencer.classes == [str(index) for index in range(11)]
    assert "2 class names for 11 classes" in inferencer.note


@pytest.mark.parametrize("config", [DET["detectron2"], DET["mmdet"], SEG["detectron2"]])
def test_a_checkpoint_is_read_once(config, weights, monkeypatch):
    """Detectron2's own, MMDetection's own, and MMSegmentation's for Detectron2."""
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (read.append(1), load(*a, **k))[1])
    name = "segmentation" if config == SEG["detectron2"] else Path(config).parts[-3]
    inferencer = load_inferencer(config, weights[name], device="cpu")
    assert len(read) == 1 and len(inferencer.classes) in (10, 11) and inferencer.note is None


def test_weights_of_detectron2_work_in_openmmlab(weights, images, tmp_path):
    elsa_core.weights.convert_file(weights["segmentation"], tmp_path / "d2.pth", "detectron2")
    image = read_image(str(images[0]))
    first = load_inferencer(SEG["mmseg"], weights["segmentation"], device="cpu").predict(image)
    second = load_inferencer(SEG["mmseg"], str(tmp_path / "d2.pth"), device="cpu").predict(image)
    assert np.array_equal(first.labels, second.labels)


def test_inputs_come_once_and_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "c.gif", "d.txt", "._b.png"):
        (tmp_path / name).touch()
    names = [str(tmp_path / "c.gif"), str(tmp_path), str(tmp_path / "*.png")]
    assert [Path(path).name for path in find_inputs(names)] == ["c.gif", "a.JPG", "b.png"]
    with pytest.raises(UsageError, match="neither a file"):
        find_inputs([str(tmp_path / "*.bmp")])


def test_results_keep_order_threshold_and_size():
    masks = np.zeros((3, 2, 2), dtype=bool)
    masks[1, 0, 1] = True
    found = Detections(
        np.array([0, 1, 2]), np.array([0.2, 0.9, 0.5]), np.arange(12.0).reshape(3, 4), masks
    )
    best = found.above(0.5)
    assert best.labels.tolist() == [1, 2] and best.masks[0, 0, 1]
    image, large = enlarge(np.zeros((2, 2, 3), np.uint8), best, least=4)
    assert image.shape == (4, 4, 3) and large.boxes[0].tolist() == [8, 10, 12, 14]
    assert large.masks[0].sum() == 4
    assert enlarge(image, best, least=4)[1] is best
    assert enlarge(np.zeros((2, 4000, 3), np.uint8), best)[1] is best
    assert replace(best, masks=None).record("abc")["instances"][0].keys() == {
        "class", "id", "score", "box",
    }  # fmt: skip
    assert Segmentation(np.full((1, 1), 300)).label_map().dtype == np.uint16
    assert len(set(palette(150))) > 140
