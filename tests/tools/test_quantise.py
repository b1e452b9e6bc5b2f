"""int8 models: which parts are int8, how far they agree, and what is written."""

import json
import os

import numpy as np
import pytest
from digit_models import DET
from PIL import Image
from trained_digits import ARCH, CHECKPOINT

from elsa_core.runtime.errors import UsageError
from elsa_tools.export import quantise as quantising
from elsa_tools.export.calibration import Images, agreement, summary
from elsa_tools.export.quantise import quantise
from elsa_tools.export.quantiser import Quantiser
from elsa_tools.export.record import Record
from elsa_tools.predict.executors import load_executor

FEATURES, DETECTION = Record(task="features"), Record(task="detection", masks="logits")


def detections(boxes, labels, scores=None, masks=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return {
        "boxes": boxes,
        "labels": np.array(labels),
        "scores": np.array(scores or [0.9] * len(boxes)),
        "masks": np.full((len(boxes), 28, 28), 8.0, np.float32) if masks is None else masks,
    }


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (40 + index, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return str(folder)


A, B = [10, 10, 30, 30], [50, 50, 70, 90]


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        (detections([A, B], [0, 1]), detections([B, A], [1, 0]), 1),
        (detections([A, B], [0, 1]), detections([A], [0]), 2 / 3),
        (detections([A], [0]), detections([A], [1]), 0),
        (detections([A], [0]), detections([[10, 10, 30, 20]], [0]), 0.5),
        # Detections near the score from which they count need not be on one side of it.
        (detections([A], [0], [0.31]), detections([A], [0], [0.29]), 1),
        (detections([A], [0], [0.31]), detections([A], [0], [0.1]), 0),
        (detections([], []), detections([], []), 1),
    ],
)
def test_agreement_of_detections(ours, theirs, wanted):
    found = [[summary(DETECTION, one)] for one in (ours, theirs)]
    assert agreement(DETECTION, *found) == pytest.approx(wanted, abs=1e-6)


def test_agreement_of_masks():
    half = np.full((1, 28, 28), 8.0, np.float32)
    half[:, :14] = -8
    ours, theirs = detections([A], [0]), detections([A], [0], masks=half)
    assert agreement(DETECTION, [ours], [theirs]) == pytest.approx(0.5, abs=0.03)
    boxes = Record(task="detection")
    assert agreement(boxes, [ours], [theirs]) == 1


def test_agreement_of_maps():
    segmentation = Record(task="segmentation")
    logits = np.zeros((1, 2, 4, 5), np.float32)
    logits[:, 1, :2] = 1
    found = [[summary(segmentation, {"logits": one})] for one in (logits, logits * 0)]
    assert agreement(segmentation, *found) == 0.5
    maps = {"res2": np.ones((1, 3, 2, 2)), "res3": np.ones((1, 3, 1, 1))}
    other = {**maps, "res3": np.full((1, 3, 1, 1), 1.1)}
    assert agreement(FEATURES, [maps], [other]) == pytest.approx(0.9)


def test_images_of_a_folder(folder):
    images = Images(folder, FEATURES, most=3)
    assert [os.path.basename(file) for file in images.files] == ["0.png", "2.png", "4.png"]
    assert [one["image"].shape for one in images] == [(1, 3, 40 + n, 60) for n in (0, 2, 4)]
    assert len(Images(folder, FEATURES, most=100)) == 6
    one = next(iter(Images(folder, DETECTION, most=1)))
    assert one["size"].tolist() == [[40, 60]] and one["size"].dtype == np.int64
    with pytest.raises(UsageError, match="at least 1, got 0"):
        Images(folder, FEATURES, most=0)


class Lossy(Quantiser):
    """Each part in int8 changes the only map by its loss."""

    path, record = "float.onnx", FEATURES
    losses = {"backbone": 0.02, "FPN": 0.2, "RPN": 0.01, "box head": 0.1}
    parts = {name: [f"operator of {name}"] for name in losses}

    def quantised(self, names, images, bar):
        return names

    def runner(self, model, threads):
        losses = [self.losses[name.removeprefix("operator of ")] for name in model or ()]
        return lambda inputs: {"res2": np.full((1, 3, 2, 2), 1 + sum(losses))}

    def write(self, model, path, record, check):
        assert record.precision == "int8"
        with open(path, "w") as file:
            json.dump(sorted(model), file)
        return os.path.getsize(path)

    def size(self):
        return 1000


@pytest.mark.parametrize(
    ("least", "left"),
    [
        (0.6, ()),
        (0.8, ("FPN",)),
        (0.95, ("FPN", "box head")),
        (0.985, ("backbone", "FPN", "box head")),
    ],
)
def test_parts_that_lose_stay_in_float32(least, left, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantising, "_quantiser", lambda path, out: Lossy())
    out = tmp_path / "int8.onnx"
    report = quantise("float.onnx", str(out), folder, least=least)
    assert report.float32 == left
    assert json.loads(out.read_text()) == sorted(f"operator of {name}" for name in report.int8)
    assert {*report.int8, *report.float32} == {*Lossy.parts}
    assert report.agreement >= least and report.images == 6
    if left:
        assert report.losses == pytest.approx(Lossy.losses)
        assert "FPN (alone loses 20.0%)" in str(report)


def test_no_part_can_be_int8(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantising, "_quantiser", lambda path, out: Lossy())
    out = tmp_path / "int8.onnx"
    with pytest.raises(UsageError, match="it does to 99.0% even with the RPN alone in int8"):
        quantise("float.onnx", str(out), folder, least=0.999)
    assert not out.exists()


@pytest.mark.parametrize(
    ("path", "out", "sentence"),
    [
        ("m.pt2", "n.xml", "must end in .onnx or .xml, got m.pt2"),
        ("m.xml", "n.onnx", "must end in .xml, got n.onnx"),
        ("m.onnx", "n.pt2", "must end in .xml or .onnx, got n.pt2"),
    ],
)
def test_bad_names_are_refused(path, out, sentence, folder):
    with pytest.raises(UsageError, match=sentence):
        quantise(path, out, folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained detector as an ONNX file, and images of what it detects."""
    pytest.importorskip("detectron2")
    from elsa_tools.export.build import wrap
    from elsa_tools.export.onnx import write_onnx
    from elsa_tools.export.record import record_of
    from elsa_tools.predict import load_inferencer
    from examples.digits.dataset import make_dataset

    folder = tmp_path_factory.mktemp("trained")
    options = [str(part) for pair in ARCH.items() for part in pair]
    inferencer = load_inferencer(DET["detectron2"], str(CHECKPOINT), device="cpu", options=options)
    path = str(folder / "float.onnx")
    write_onnx(wrap(inferencer), path, record_of(inferencer))
    data = make_dataset(folder / "data", train=1, val=6, size=160, seed=0, progress=False)
    return path, str(data.path / "images/validation")


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".xml", ".onnx"])
def test_a_trained_detector(trained, ending, tmp_path):
    if ending == ".xml":
        pytest.importorskip("openvino", reason="needs the package openvino")
        pytest.importorskip("nncf", reason="needs the package nncf")
    path, images = trained
    out, checked = str(tmp_path / f"int8{ending}"), []
    report = quantise(path, out, images, least=0.5, check=checked.append)
    assert {*report.int8, *report.float32} == {"backbone", "FPN", "RPN", "box head", "mask head"}
    assert report.losses == {} and report.agreement > 0.8 and report.images == 6
    assert len(checked) == 1 and report.sizes[1] < report.sizes[0]
    executors = [load_executor(name, threads=1) for name in (path, out)]
    assert [one.record.precision for one in executors] == ["float32", "int8"]
    record = executors[0].record
    batch = list(Images(images, record, most=2))
    both = {name: np.concatenate([one[name] for one in batch]) for name in batch[0]}
    found = [[summary(record, one.run(**both))] for one in executors]
    assert 0.8 < agreement(record, *found) < 1
    with pytest.raises(UsageError, match="must be a float32 model, it is int8"):
        quantise(out, str(tmp_path / f"again{ending}"), images)
    assert sorted(os.listdir(tmp_path)) == sorted({f"int8{ending}", *_beside(ending)})


@pytest.mark.slow
def test_only_what_is_quantised_is_calibrated(trained, tmp_path):
    """The tensors of all nodes do not fit into memory at once for large images."""
    from elsa_tools.export.quantise_onnx import OnnxRuntime, _Calibrater

    path = tmp_path / "model.onnx"
    path.symlink_to(trained[0])
    nodes = [node for part in OnnxRuntime(trained[0]).parts.values() for node in part]
    calibrater = _Calibrater(path, nodes[:1])
    assert len(calibrater.select_tensors_to_calibrate(calibrater.model)[0]) == 2


def _beside(ending):
    return ["int8.bin"] if ending == ".xml" else []
