"""The detectors' operators in ONNX against PyTorch's, in onnxruntime and OpenVINO."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from detection_inputs import SCALES, pyramid, random_boxes, random_scores, rois
from torch import Tensor, nn

from elsa_tools.export.onnx_ops import TRANSLATIONS

DYNAMIC = torch.export.Dim.DYNAMIC


class Operator(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor):
        return self.function(*inputs)


def export(function, example, path):
    """Write an ONNX file with all sizes dynamic but those of 4 and the channels of maps."""
    shapes = tuple(
        {axis: DYNAMIC for axis in range(x.dim()) if not (axis == 1 and x.dim() == 4)}
        if x.shape[-1:] != (4,)
        else {axis: DYNAMIC for axis in range(x.dim() - 1)}
        for x in example
    )
    program = torch.onnx.export(
        Operator(function).eval(),
        example,
        dynamo=True,
        optimize=False,
        opset_version=20,
        input_names=[f"input{index}" for index in range(len(example))],
        dynamic_shapes=(shapes,),
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    )
    program.save(path)


@pytest.fixture(params=["onnxruntime", "openvino"])
def load(request):
    """path -> (inputs -> outputs) in an executor."""
    if request.param == "onnxruntime":

        def load(path):
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            return lambda inputs: session.run(None, inputs)

        return load
    ov = pytest.importorskip("openvino")
    from elsa_tools.export.openvino_ops import follow_onnx

    def load(path):
        model = ov.Core().read_model(path)
        follow_onnx(model)
        compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda inputs: [output.copy() for output in compiled(inputs).to_tuple()]

    return load


def check(load, function, example, cases, path):
    """Indices are equal, values to 1e-5, for all cases of one file."""
    export(function, example, path)
    run = load(path)
    for case in cases:
        wanted = function(*case)
        wanted = [wanted] if isinstance(wanted, Tensor) else wanted
        found = run({f"input{index}": x.numpy() for index, x in enumerate(case)})
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.numpy().dtype
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=0, atol=0 if b.dtype == torch.int64 else 1e-5)


def test_topk(load, tmp_path):
    cases = [
        (random_scores(batch, count, levels=levels),)
        for batch, count in ((1, 2000), (3, 50000), (2, 7), (2, 0), (1, 1))
        for levels in (0, 20)
    ]
    check(load, lambda x: torch.ops.elsa.topk(x, 100), cases[2], cases, tmp_path / "topk.onnx")


@pytest.mark.parametrize("iou_threshold", [0.5, 0.6])
def test_nms(load, tmp_path, iou_threshold):
    cases = [
        (random_boxes(batch, count, grid=grid), random_scores(batch, count, levels=levels))
        for batch, count in ((1, 5), (3, 1500), (2, 0), (1, 1))
        for grid in (0, 4)
        for levels in (0, 20)
    ]
    boxes, scores = random_boxes(3, 50), random_scores(3, 50)
    scores[1] = 0  # an image without a box
    cases += [(boxes, scores), (boxes, torch.zeros_like(scores))]

    def function(boxes, scores):
        return torch.ops.elsa.nms(boxes, scores, iou_threshold, 0.2, 300)

    check(load, function, cases[4], cases, tmp_path / "nms.onnx")


@pytest.mark.parametrize(("size", "sampling_ratio"), [(7, 0), (14, 0), (7, 2)])
def test_roi_align(load, tmp_path, size, sampling_ratio):
    cases = []
    for count in (9, 0, 1, 600):
        boxes, images, levels = rois(count)
        boxes[4:6, 2:] = float("nan")
        boxes[6:8, 0] = float("-inf")
        cases.append((*pyramid(), boxes, images, levels))
        cases.append((*pyramid(), boxes, images, torch.ones_like(levels)))  # two empty levels

    def function(a, b, c, *of_boxes):
        return torch.ops.elsa.roi_align([a, b, c], *of_boxes, SCALES, size, sampling_ratio)

    check(load, function, cases[0], cases, tmp_path / "roi_align.onnx")


def test_sigmoid(load, tmp_path):
    """In the order of its inputs and with a small relative error, in the smallest values, too."""
    x = torch.cat([torch.linspace(-20, 20, 40001), torch.tensor([-200.0, 200.0])])
    path = tmp_path / "sigmoid.onnx"
    export(torch.sigmoid, (x,), path)
    (found,) = load(path)({"input0": x.numpy()})
    np.testing.assert_allclose(found, x.sigmoid(), rtol=1e-6, atol=0)
    assert (np.diff(found[:-2]) >= 0).all()
