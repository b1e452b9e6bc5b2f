"""What must not be exported, and what must not happen to files and programs when it is."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from digit_models import DET, SEG

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import temporary_folder
from elsa_tools.export import onnx, write
from elsa_tools.export.build import wrap
from elsa_tools.export.cli import check_options, parse_arguments
from elsa_tools.export.record import Record
from elsa_tools.export.write import write_model
from elsa_tools.predict import load_inferencer
from elsa_tools.predict.executors import Executor

OTHER_MM = {
    "neck.lateral_convs.0.gn.eps": "neck=dict(norm_cfg=dict(eps=0.1))",
    "the activation of neck": "neck=dict(act_cfg=dict(type='ReLU'))",
    "neck.lateral_convs.0.conv must be a plain": "neck=dict(conv_cfg=dict(type='ConvWS'))",
    "roi_head.bbox_head.fc_cls must be a plain": (
        "roi_head=dict(bbox_head=dict(cls_predictor_cfg=dict(type='NormedLinear')))"
    ),
    "strides": "rpn_head=dict(anchor_generator=dict(strides=[8, 16, 32, 64, 128]))",
    "featmap_strides": "roi_head=dict(bbox_roi_extractor=dict(featmap_strides=[4, 8]))",
    "nms_pre must be at least 1": "test_cfg=dict(rpn=dict(nms_pre=-1))",
    "rcnn.max_per_img must be at least 1": "test_cfg=dict(rcnn=dict(max_per_img=-1))",
    "mask_thr_binary must be at least 0": "test_cfg=dict(rcnn=dict(mask_thr_binary=-1))",
    "cannot be built: AssertionError": "neck=dict(end_level=2)",
}


@pytest.mark.parametrize("part", OTHER_MM)
def test_other_parts_of_mmdetection_are_named(part, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(f"_base_ = [{DET['mmdet']!r}]\nmodel = dict({OTHER_MM[part]})\n")
    with pytest.raises(UsageError, match=part):
        wrap(load_inferencer(str(config), None, device="cpu"))


OTHER_D2 = {
    "fpn_lateral2.norm must be a plain": ["MODEL.FPN.NORM", "LN"],
    "ROI_HEADS.IN_FEATURES": ["MODEL.ROI_HEADS.IN_FEATURES", "['p3', 'p4', 'p5']"],
    "DETECTIONS_PER_IMAGE must be at least 1": ["TEST.DETECTIONS_PER_IMAGE", "-1"],
    "PRE_NMS_TOPK_TEST must be at least 1": ["MODEL.RPN.PRE_NMS_TOPK_TEST", "0"],
}


@pytest.mark.parametrize("part", OTHER_D2)
def test_other_parts_of_detectron2_are_named(part):
    with pytest.raises(UsageError, match=part):
        wrap(load_inferencer(DET["detectron2"], None, device="cpu", options=OTHER_D2[part]))


@pytest.mark.parametrize("norm", ["FrozenBN", "naiveSyncBN"])
def test_ordinary_norms_of_detectron2_are_exported(norm):
    options = ["MODEL.FPN.NORM", norm]
    assert wrap(load_inferencer(DET["detectron2"], None, device="cpu", options=options))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("align_corners", "decode_head=dict(align_corners=True)"),
        ("out_channels", "decode_head=dict(num_classes=2, out_channels=1)"),
        (
            "has a neck",
            "neck=dict(type='FPN', in_channels=[32, 64, 128, 256], num_outs=4, out_channels=48)",
        ),
    ],
)
def test_other_parts_of_mmsegmentation_are_named(part, change, tmp_path):
    config = tmp_path / "config.py"
    body = f"_base_ = [{SEG['mmseg']!r}]\nmodel = dict({change}, auxiliary_head=None)\n"
    config.write_text(body)
    with pytest.raises(UsageError, match=part):
        wrap(load_inferencer(str(config), None, device="cpu"))


class Echo(Executor):
    def _run(self, inputs):
        return [*inputs.values()]


RECORD = Record(task="detection", classes=("a",), colours=((0, 0, 0),))
IMAGE, SIZE = np.zeros((2, 3, 8, 9), np.float32), np.array([[8, 9], [5, 6]])


@pytest.mark.parametrize(
    ("image", "size", "rule"),
    [
        (IMAGE.astype(np.uint8), SIZE, "image must be float32"),
        (IMAGE[:, :1], SIZE, "image must be float32"),
        (IMAGE[:0], SIZE[:0], "image must be float32"),
        (IMAGE, SIZE.astype(np.float32), "size must be int64"),
        (IMAGE, SIZE[:1], "size must be int64"),
        (IMAGE, SIZE[:, ::-1], "size must be from 1 to the"),
        (IMAGE, SIZE - 5, "size must be from 1 to the"),
    ],
)
def test_executors_refuse_other_inputs(image, size, rule):
    names = ["image", "size"], ["boxes", "scores", "labels", "images"]
    with pytest.raises(UsageError, match=rule):
        Echo("m.onnx", RECORD, *names).run(image, size)


def test_a_full_temporary_folder_is_one_sentence(tmp_path, monkeypatch):
    def full(module, path, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx, "write_onnx", full)
    with pytest.raises(UsageError, match=r"model.onnx cannot be written: No space left"):
        write_model(None, RECORD, str(tmp_path / "m.xml"), verified=False)
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_keeps_the_file(tmp_path, monkeypatch):
    def full(report, images):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write, "_reserve", full)
    monkeypatch.setattr(onnx, "write_onnx", lambda module, path, record: None)
    old = tmp_path / "m.onnx"
    old.write_text("old")
    with pytest.raises(UsageError, match=r"report.json cannot be written: No space left"):
        write_model(None, RECORD, str(old), verified=False)
    assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--int8", "."], "no image and no video found"),
        (["--images", "text.png"], "cannot be read as an image"),
        (["--out", "folder.onnx"], "is a folder"),
    ],
)
def test_options_are_refused_before_the_work(options, rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder.onnx")
    if "--images" in options:
        (tmp_path / "text.png").write_text("text")
    with pytest.raises(UsageError, match=rule):
        arguments = ["--config", DET["mmdet"], "--out", "m.onnx", *options]
        check_options(parse_arguments(arguments, "export"))


def test_a_signal_removes_temporary_folders(tmp_path):
    code = """
import os, signal
from elsa_core.runtime.files import temporary_folder
with temporary_folder() as folder:
    open(os.path.join(folder, "model.onnx"), "w").close()
    os.kill(os.getpid(), signal.SIGTERM)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment)
    assert found.returncode == -signal.SIGTERM
    assert not list(tmp_path.iterdir())
    with temporary_folder() as folder:
        assert os.path.isdir(folder)
    assert not os.path.exists(folder)
