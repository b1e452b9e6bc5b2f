"""Exported models without the frameworks: their executors, test pipeline, pictures and command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from digit_models import DET, SEG, untrained
from docs_blocks import REPOSITORY, read_page
from toy_models import NAMES, RECORD, SCORES, Toy, save_onnx, save_pt2

from elsa_core.runtime.errors import UsageError
from elsa_tools.export.build import wrap
from elsa_tools.export.onnx import write_onnx
from elsa_tools.export.record import KEY, Record, Resize, record_of
from elsa_tools.predict import Detections, Segmentation, load_exported, load_inferencer
from elsa_tools.predict.cli import main
from elsa_tools.predict.drawing import Painter
from elsa_tools.predict.executors import load_executor
from elsa_tools.predict.runtime import label_map, prepare, resize_masks

WHITE = np.full((48, 80, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    return save_onnx(tmp_path_factory.mktemp("toy") / "toy.onnx")


@pytest.fixture(scope="module", params=[".onnx", ".pt2", ".xml"])
def toy(request, onnx_file):
    if request.param == ".onnx":
        return onnx_file
    if request.param == ".pt2":
        return save_pt2(Path(onnx_file).with_suffix(".pt2"))
    pytest.importorskip("openvino")
    from elsa_tools.export.openvino import to_openvino

    path = str(Path(onnx_file).with_suffix(".xml"))
    to_openvino(onnx_file, path)
    return path


def changed(onnx_file, path, record):
    """The file with another record (None: with none)."""
    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    if record is not None:
        onnx.helper.set_model_props(model, {KEY: record.to_json()})
    onnx.save(model, path)
    return str(path)


@pytest.mark.slow
def test_an_executor_gives_what_pytorch_gives(toy):
    executor = load_executor(toy, "cpu", threads=1)
    assert executor.record == RECORD
    image = torch.randint(0, 256, (3, 3, 33, 70)).float()
    size = torch.tensor([[33, 70], [20, 30], [1, 1]])
    wanted = dict(zip(NAMES, Toy()(image, size), strict=True))
    found = executor.run(image.numpy(), size.numpy())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.numpy().dtype
        assert np.allclose(found[name], value, atol=1e-6), name
    whole = executor.run(image.numpy())["boxes"]
    assert np.allclose(whole[3:6], found["boxes"][:3])


def test_results_are_those_of_the_image(toy):
    model = load_exported(toy, device="cpu", threads=1)
    found = model.predict(WHITE)
    assert (model.task, model.framework, model.classes[2]) == ("detection", "mmdet", "café")
    assert found.labels.tolist() == [0, 1, 2] and np.allclose(found.scores, SCORES)
    # Of 80x48, through 100x60; clipped.
    wanted = [[8, 9.6, 40, 28.8], [40, 4.8, 80, 43.2], [0, 9.6, 0, 28.8]]
    assert np.allclose(found.boxes, wanted, atol=1e-4)
    assert found.masks.shape == (3, 48, 80) and found.masks.dtype == bool
    rows, columns = np.nonzero(found.masks[0])
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (8, 23, 10, 28)
    assert not found.masks[2].any() and 0 < model.model_seconds < 10


def test_a_batch_gives_what_single_images_give(toy):
    model = load_exported(toy, device="cpu")
    images = [np.full((height, width, 3), 200, np.uint8) for height, width in [(48, 80), (90, 31)]]
    for found, image in zip(model.predict_batch(images), images, strict=True):
        single = model.predict(image)
        for field in ("labels", "scores", "boxes", "masks"):
            assert np.array_equal(getattr(found, field), getattr(single, field))


def test_detectron2_leaves_out_boxes_without_area(onnx_file, tmp_path):
    record = dataclasses.replace(RECORD, framework="detectron2")
    found = load_exported(changed(onnx_file, tmp_path / "d2.onnx", record)).predict(WHITE)
    assert found.labels.tolist() == [0, 1] and found.masks.shape == (2, 48, 80)


@pytest.mark.parametrize("framework", ["detectron2", "mmdet", "mmseg", "pillow"])
def test_the_test_pipeline_is_the_frameworks(framework):
    options = ["INPUT.RESIZE_BACKEND", "pil"] if framework == "pillow" else []
    config = {**SEG, **DET}.get(framework, DET["detectron2"])
    inferencer = load_inferencer(config, None, device="cpu", options=options)
    record = record_of(inferencer)
    generator = np.random.default_rng(0)
    for height, width in [(96, 96), (43, 301), (311, 200), (7, 5)]:
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if framework in ("mmdet", "mmseg"):
            wanted = inferencer.pipeline(dict(img=image, img_id=0))["inputs"].numpy()[::-1]
        else:
            rgb = np.ascontiguousarray(image[..., ::-1])
            transform = inferencer.predictor.aug.get_transform(rgb)
            wanted = transform.apply_image(rgb).transpose(2, 0, 1)
        assert np.array_equal(prepare(record, image), wanted), (height, width)
    normalised = dataclasses.replace(record, normalised=True)
    mean, std = (np.float32(part)[:, None, None] for part in inferencer.normalisation())
    assert np.allclose(prepare(normalised, image), (wanted - mean) / std, atol=1e-5)


@pytest.mark.slow
def test_a_segmentor_predicts_what_its_checkpoint_predicts(digits, tmp_path):
    inferencer = untrained(SEG["mmseg"])
    path = str(tmp_path / "upernet.onnx")
    write_onnx(wrap(inferencer), path, record_of(inferencer))
    model = load_exported(path, device="cpu")
    assert model.classes[0] == "background" and len(model.colours) == 11
    image = cv2.imread(str(min((digits / "images/validation").glob("*.jpg"))))
    for size in [(96, 96), (50, 133), (201, 97)]:
        resized = cv2.resize(image, size)
        same = model.predict(resized).labels == inferencer.predict(resized).labels
        assert same.shape == size[::-1] and same.mean() > 0.9999
    out = tmp_path / "out"
    picture = tmp_path / "picture.png"
    cv2.imwrite(str(picture), image)
    assert main([str(picture), "--model", path, "--out", str(out)]) == 0
    (entry,) = json.loads((out / "results.json").read_text())["images"]
    labels = cv2.imread(str(out / entry["segmentation"]["label_map"]), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(labels, model.predict(image).labels)
    assert cv2.imread(str(out / entry["picture"])).shape == (480, 480, 3)


def test_label_maps_and_masks_change_size():
    logits = np.random.default_rng(0).random((4, 6, 9), dtype=np.float32)
    assert np.array_equal(label_map(logits, (6, 9)), logits.argmax(0))
    assert label_map(logits, (13, 7)).shape == (13, 7)
    masks = np.zeros((2, 4, 4), np.uint8)
    masks[0, :, :2] = 1
    large = resize_masks(masks, (8, 8))
    assert large.dtype == bool and large[0, :, :4].all() and large.sum() == 32
    assert resize_masks(masks, (4, 4)).sum() == 8


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model.pth", "the model must be a file .onnx or .pt2 or .xml"),
        ("missing.onnx", "missing.onnx does not exist"),
        ("broken.onnx", "broken.onnx cannot be loaded by onnxruntime"),
        ("empty.onnx", "empty.onnx cannot be loaded by onnxruntime"),
        ("broken.pt2", "broken.pt2 must be a .pt2 file"),
    ],
)
def test_a_file_that_cannot_be_run_is_one_sentence(name, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, content in (
        ("model.pth", b"x"),
        ("broken.onnx", b"\x08\x07" * 99),
        ("broken.pt2", b"x"),
    ):
        Path(file).write_bytes(content)
    Path("empty.onnx").touch()
    with pytest.raises(UsageError) as error:
        load_executor(name)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (None, "has no record 'elsa'"),
        (dataclasses.replace(RECORD, masks=None), "must be boxes, scores, labels, images, got"),
        (dataclasses.replace(RECORD, task="segmentation"), "must be image, got image, size"),
        (Record(task="features"), "must be image, got image, size"),
        (dataclasses.replace(RECORD, classes=(), colours=()), "it names none"),
    ],
    ids=["none", "masks", "task", "features", "classes"],
)
def test_a_record_that_does_not_match_is_one_sentence(record, sentence, onnx_file, tmp_path):
    with pytest.raises(UsageError) as error:
        load_exported(changed(onnx_file, tmp_path / "other.onnx", record))
    assert sentence in str(error.value)


def test_a_backbone_is_no_model_to_show(tmp_path):
    from onnx import TensorProto, helper

    image, maps = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3, None, None])
        for name in ("image", "res2")
    )
    node = helper.make_node("Identity", ["image"], ["res2"])
    model = helper.make_model(
        helper.make_graph([node], "backbone", [image], [maps]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    helper.set_model_props(model, {KEY: Record(task="features").to_json()})
    onnx.save(model, tmp_path / "backbone.onnx")
    path = str(tmp_path / "backbone.onnx")
    assert load_executor(path).run(np.zeros((1, 3, 8, 8), np.float32))["res2"].shape == (1, 3, 8, 8)
    with pytest.raises(UsageError, match="must be a detector or a segmentor"):
        load_exported(path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "toaster"}, "--device must be one that this onnxruntime has"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_used_are_one_sentence(settings, sentence, onnx_file):
    with pytest.raises(UsageError, match=sentence):
        load_executor(onnx_file, **settings)


@pytest.mark.parametrize(
    ("package", "ending"), [("onnxruntime", ".onnx"), ("openvino", ".xml"), ("supervision", "")]
)
def test_a_missing_package_is_named(package, ending, onnx_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "supervision":
        model = load_exported(onnx_file)
        with pytest.raises(UsageError, match="drawing what an exported model finds needs .* supe"):
            model.draw(WHITE, model.predict(WHITE))
        return
    path = tmp_path / f"model{ending}"
    path.touch()
    with pytest.raises(UsageError, match=f"needs the Python package {package}"):
        load_executor(str(path))


def demo(*arguments):
    return main([*map(str, arguments)])


def test_the_command_writes_what_it_writes_for_checkpoints(toy, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.png"), WHITE)
    cv2.imwrite(str(tmp_path / "b.png"), WHITE[:, :40])
    annotations = {
        "images": [
            {"id": 7 + i, "file_name": f"{name}.png", "height": 48, "width": 80}
            for i, name in enumerate("ab")
        ],
        "categories": [{"id": 9 - i, "name": name} for i, name in enumerate(RECORD.classes)],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 9,
                "bbox": [1, 1, 9, 9],
                "area": 81,
                "iscrowd": 0,
            }
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(annotations))
    out = tmp_path / "out"
    coco = ["--coco", tmp_path / "coco.json"]
    given = [tmp_path / "a.png", tmp_path / "b.png", "--model", toy, "--out", out, "--threads", 1]
    assert demo(*given, *coco, "--score-threshold", 0.5) == 0
    record = json.loads((out / "results.json").read_text())
    assert record["model"] == toy and not {"config", "weights"} & record.keys()
    assert (record["framework"], record["classes"]) == ("mmdet", list(RECORD.classes))
    assert record["time"]["images"] == 2
    assert 0 < record["time"]["model_ms"] <= record["time"]["image_ms"]
    assert "ms an image, the model" in capsys.readouterr().out
    first = record["images"][0]
    assert [one["class"] for one in first["instances"]] == ["cat", "dog"]
    assert first["instances"][0]["box"] == [8, 9.6, 40, 28.8]
    entries = json.loads((out / "coco_results.json").read_text())
    assert [entry["category_id"] for entry in entries] == [9, 8, 9, 8]
    picture = cv2.imread(str(out / first["picture"]))
    assert picture.shape == (480, 800, 3) and picture.min() < 80


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--config and --weights, got none"),
        (["--config", "a.py"], "--config and --weights, got --config"),
        (["--model", "m.onnx", "--weights", "w.pth"], "got --weights and --model"),
        (["--model", "m.onnx", "--opts", "a=1"], "--opts belongs to --config"),
        (["--model", "m.onnx", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["--config", "a.py", "--weights", "w.pth", "--compiled"], "--compiled belongs to --model"),
        (["--model", "m.onnx"], "the model m.onnx does not exist"),
    ],
    ids=str,
)
def test_bad_use_is_one_sentence(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("a.png", WHITE)
    assert demo("a.png", "--out", "out", *arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_a_model_is_never_replaced(onnx_file, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.png"), WHITE)
    folder = Path(onnx_file).parent
    assert demo(tmp_path / "a.png", "--model", onnx_file, "--out", folder) == 2
    assert "another folder than that of the inputs" in capsys.readouterr().err


@pytest.mark.slow
def test_neither_framework_is_needed(onnx_file, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), WHITE)
    blocked = "detectron2 fvcore mmcv mmdet mmengine mmseg mmpretrain torchvision onnx onnxscript"
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}.split()))\n"
        "from elsa_tools.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["demo", tmp_path / "a.png", "--model", onnx_file, "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out/results.json").read_text())["images"]) == 1


def test_the_example_of_the_docs_needs_three_packages(onnx_file, tmp_path):
    (example,) = (
        block.code
        for block in read_page(REPOSITORY / "docs/inference.md")
        if block.what == "detect.py"
    )
    assert example.count("\n") <= 30
    (tmp_path / "detect.py").write_text(
        f"import sys; sys.modules.update(dict.fromkeys({['torch', 'cv2', 'elsa_core']}))\n{example}"
    )
    cv2.imwrite(str(tmp_path / "a.png"), WHITE)
    command = [sys.executable, "detect.py", onnx_file, "a.png", "found.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["cat 0.90 at 8,10 - 40,29", "dog 0.60 at 40,5 - 96,43"]
    picture = cv2.imread(str(tmp_path / "found.png"))
    assert picture.shape == WHITE.shape and picture[26, 12].tolist() == [145, 145, 255]


def painter():
    return Painter(["background", "a", "b"], [(0, 0, 0), (250, 250, 0), (60, 0, 120)])


def test_objects_are_painted_in_the_colour_of_their_class():
    image = np.full((300, 400, 3), 128, np.uint8)
    masks = np.zeros((2, 300, 400), bool)
    masks[0, 60:100, 60:100] = masks[1, 160:200, 260:300] = True
    boxes = np.float32([[50, 50, 150, 150], [250, 150, 350, 250]])
    found = Detections(np.array([1, 2]), np.float32([0.9, 0.8]), boxes, masks)
    picture = painter().draw(image, found)
    assert (image == 128).all() and picture.shape == image.shape
    assert (picture[110, 50] == (0, 250, 250)).all()  # the left side of a box
    for pixel, colour in ((picture[80, 80], (0, 250, 250)), (picture[180, 280], (120, 0, 60))):
        assert (np.abs(pixel - (0.45 * np.array(colour) + 0.55 * 128)) <= 1).all()
    assert (picture[140, 140] == 128).all()  # in the box, but not in the mask
    boxes_only = painter().draw(image, dataclasses.replace(found, masks=None))
    assert (boxes_only[80, 80] == 128).all() and (boxes_only[110, 50] == (0, 250, 250)).all()
    assert (painter().draw(image, found.above(0.95)) == image).all()


def test_label_maps_are_painted_and_named():
    image = np.full((300, 400, 3), 128, np.uint8)
    labels = np.zeros((300, 400), int)
    assert (painter().draw(image, Segmentation(labels)) == image).all()  # the background
    labels[:, 200:] = 1
    labels[:2, :2] = 2
    picture = painter().draw(image, Segmentation(labels))
    assert (picture[100:, :190] == 128).all()
    blended = 0.45 * np.array([0, 250, 250]) + 0.55 * 128
    assert (np.abs(picture[10, 390] - blended) <= 1).all()
    named = (picture == (0, 250, 250)).all(axis=-1)
    rows, columns = np.nonzero(named[:, 210:390])
    assert 100 < rows.mean() < 200 and 50 < columns.mean() < 130  # in the middle of its region
    many = np.random.default_rng(0).integers(0, 3, (300, 400))
    assert painter().draw(image, Segmentation(many)).shape == image.shape


def test_resize_of_a_record_is_applied():
    record = Record(task="detection", resize=Resize(10, 30, "pillow"))
    assert prepare(record, WHITE).shape == (3, 10, 17)
    assert prepare(dataclasses.replace(record, resize=None), WHITE).shape == (3, 48, 80)
