"""The record of an exported model: what it says, and how strictly it is read."""

import json

import mmcv
import numpy as np
import pytest
from detectron2.data import transforms as T
from digit_models import DET, DIGITS, SEG

from elsa_core.runtime.errors import UsageError
from elsa_d2.data.augmentation import OpenCVResizeShortestEdge
from elsa_tools.export.record import Record, Resize, record_of
from elsa_tools.predict import load_inferencer

FULL = Record(
    task="detection",
    framework="mmdet",
    classes=("a", "b"),
    colours=((1, 2, 3), (4, 5, 6)),
    resize=Resize(800, 1333, "opencv"),
    masks="logits",
    precision="int8",
)


@pytest.mark.parametrize(
    "record", [FULL, Record(task="features", normalised=True)], ids=["", "bare"]
)
def test_a_record_survives(record):
    assert Record.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema": 2}, "must be of schema 1, got 2"),
        ({"schema": None}, "must be of schema 1, got None"),
        ({"task": "boxes"}, "task in the record 'elsa' must be \"detection\" or"),
        ({"task": ["detection"]}, "task in the record 'elsa' must be"),
        ({"classes": ["a", 1]}, "classes in the record 'elsa' must be a list of names"),
        ({"classes": ["a"]}, "a colour for each class, got 2 for 1"),
        ({"colours": [[1, 2, 3], [4, 5, 256]]}, "colours in the record 'elsa' must be"),
        ({"normalised": 1}, "must be true or false, got 1"),
        ({"mean": [1, 2]}, "must be three numbers, got [1, 2]"),
        ({"std": [1, 2, 0]}, "must be three numbers > 0"),
        ({"std": [1, 2, float("nan")]}, "must be three numbers > 0"),
        ({"resize": {"short": 800, "long": 1333}}, "must be null or {short, long, backend}"),
        ({"resize": {"short": 0, "long": 9, "backend": "opencv"}}, "must be null or {short"),
        ({"masks": "boxes"}, 'must be "logits" or "pasted" or null'),
        ({"score_threshold": True}, "must be in [0, 1], got True"),
        ({"more": 1}, "has the unknown field 'more'"),
    ],
    ids=str,
)
def test_another_record_is_one_sentence(changes, sentence):
    content = {**json.loads(FULL.to_json()), **changes}
    with pytest.raises(UsageError) as error:
        Record.from_json(json.dumps(content))
    assert sentence in str(error.value)


@pytest.mark.parametrize("field", json.loads(FULL.to_json()))
def test_a_missing_field_is_named(field):
    content = json.loads(FULL.to_json())
    del content[field]
    with pytest.raises(UsageError, match=f"field '{field}'"):
        Record.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "[]", "{", "1", "[" * 100_000, "\0"])
def test_another_text_is_one_sentence(text):
    with pytest.raises(UsageError, match="the record 'elsa' must be"):
        Record.from_json(text)


def test_sizes_are_the_frameworks():
    generator = np.random.default_rng(0)
    for height, width in generator.integers(1, 700, (2000, 2)).tolist():
        short, long = sorted(generator.integers(30, 1400, 2).tolist())
        got = {name: Resize(short, long, name).size(height, width) for name in ("opencv", "pillow")}
        assert got["opencv"] == mmcv.rescale_size((width, height), (long, short))[::-1]
        image = np.broadcast_to(np.uint8(0), (height, width, 3))
        cv2_transform = OpenCVResizeShortestEdge([short, short], long).get_transform(image)
        assert got["opencv"] == (cv2_transform.new_h, cv2_transform.new_w)
        wanted = T.ResizeShortestEdge.get_output_shape(height, width, short, long)
        assert got["pillow"] == wanted


@pytest.mark.parametrize("framework", DET)
def test_detectors(framework):
    settings = {
        "detectron2": ["INPUT.RESIZE_BACKEND", "pil", "INPUT.MAX_SIZE_TEST", "200"],
        "mmdet": ["model.test_cfg.rcnn.score_thr=0.1", "model.test_cfg.rcnn.mask_thr_binary=0.4"],
    }
    inferencer = load_inferencer(DET[framework], None, device="cpu", options=settings[framework])
    record = record_of(inferencer)
    assert (record.task, record.framework, record.masks) == ("detection", framework, "logits")
    assert record.classes == tuple(DIGITS) and len(record.colours) == 10
    assert record.mean == Record(task="").mean and not record.normalised
    if framework == "detectron2":
        assert record.resize == Resize(160, 200, "pillow")
        assert (record.score_threshold, record.mask_threshold) == (0.05, 0.5)
    else:
        assert record.resize == Resize(160, 1333, "opencv")
        assert (record.score_threshold, record.mask_threshold) == (0.1, 0.4)
    bare = record_of(inferencer, "features")
    assert (bare.task, bare.masks, bare.resize, bare.classes) == ("features", None, None, ())
    assert Record.from_json(record.to_json()) == record


def test_segmentors_of_both_frameworks_are_the_same():
    records = [record_of(load_inferencer(SEG[name], None, device="cpu")) for name in SEG]
    for record in records:
        assert (record.task, record.masks) == ("segmentation", None)
        assert record.classes == ("background", *DIGITS)
        assert record.resize == Resize(96, 2048, "opencv")


STEP = "test_dataloader.dataset.pipeline.1"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({f"{STEP}.keep_ratio": False}, "must have keep_ratio=True, got False"),
        ({f"{STEP}.backend": "pillow"}, "must have backend='cv2', got 'pillow'"),
        ({f"{STEP}.interpolation": "area"}, "must have interpolation='bilinear', got 'area'"),
        ({f"{STEP}.scale": None, f"{STEP}.scale_factor": 2.0}, "must have a scale, got"),
        ({f"{STEP}.type": "Pad"}, "LoadAnnotations and PackSegInputs, got Pad"),
        ({"test_dataloader.dataset.pipeline.0.to_float32": True}, "to_float32=False, got True"),
        ({"model.test_cfg.mode": "slide"}, "must have model.test_cfg.mode='whole', got 'slide'"),
        ({"model.data_preprocessor.test_cfg": {"size": [64, 64]}}, "must not pad test images"),
    ],
    ids=str,
)
def test_another_test_pipeline_is_one_sentence(changes, sentence):
    inferencer = load_inferencer(SEG["mmseg"], None, device="cpu")
    inferencer.cfg.merge_from_dict(changes)
    model, node = inferencer.model, inferencer.cfg.model
    model.test_cfg, model.data_preprocessor.test_cfg = (
        node.test_cfg,
        node.data_preprocessor.get("test_cfg"),
    )
    with pytest.raises(UsageError) as error:
        record_of(inferencer)
    assert sentence in str(error.value)
