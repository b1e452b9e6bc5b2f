from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchvision
from detection_inputs import SCALES, pyramid, random_boxes, random_scores, rois
from torch import Tensor, nn

from elsa_core import detection


@pytest.fixture(params=["torchvision", "plain"])
def kernels(request, monkeypatch):
    # The kernels for CUDA are called as those for the CPU are.
    wanted = request.param == "torchvision"
    monkeypatch.setattr(detection, "has_kernel", lambda name, device_type: wanted)
    return request.param


@pytest.mark.parametrize("levels", [0, 20])
@pytest.mark.parametrize(("count", "k"), [(5000, 100), (50, 100), (0, 7), (9, 0), (7, 7)])
def test_topk_is_a_stable_sort(count, k, levels):
    scores = random_scores(3, count, levels=levels)
    values, indices = torch.ops.elsa.topk(scores, k)
    wanted, order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, wanted[:, :k])
    assert torch.equal(indices, order[:, :k])


def test_topk_puts_nan_first_as_sort():
    scores = torch.tensor([[1.0, float("nan"), 3.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 0.0]])
    assert torch.ops.elsa.topk(scores, 3)[1].tolist() == [[1, 2, 4], [3, 2, 1]]
    assert torch.ops.elsa.topk(scores[:0], 3)[1].shape == (0, 3)


@pytest.mark.parametrize("levels", [0, 20])
@pytest.mark.parametrize("grid", [0, 4])
@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.6, 0.7])
def test_nms_keeps_torchvision_boxes(kernels, iou_threshold, grid, levels):
    boxes = random_boxes(2, 3000, grid=grid)
    scores = random_scores(2, 3000, levels=levels)
    indices, values = torch.ops.elsa.nms(boxes, scores, iou_threshold, 0.2, 3000)
    for image in range(2):
        able = (scores[image] > 0.2).nonzero().squeeze(1)
        kept = torchvision.ops.nms(boxes[image, able], scores[image, able], iou_threshold)
        wanted = able[kept]
        assert torch.equal(indices[image, : len(wanted)], wanted)
        assert torch.equal(values[image, : len(wanted)], scores[image, wanted])
        assert not indices[image, len(wanted) :].any()
        assert (values[image, len(wanted) :] == -1).all()
    few = torch.ops.elsa.nms(boxes, scores, iou_threshold, 0.2, 10)
    assert torch.equal(few[0], indices[:, :10])
    assert torch.equal(few[1], values[:, :10])


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_nms_of_nothing(kernels, shape):
    indices, values = torch.ops.elsa.nms(random_boxes(*shape), random_scores(*shape), 0.5, 0.0, 4)
    assert indices.dtype == torch.int64
    assert indices.shape == values.shape == (shape[0], 4)
    assert (values == -1).all()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7, 0.05])
def test_float32_threshold(threshold):
    rounded = torch.tensor(threshold)
    for value in (rounded, rounded.nextafter(torch.tensor(0.0)), rounded.nextafter(rounded + 1)):
        wanted = value.item() > threshold
        assert (value > torch.tensor(detection.float32_threshold(threshold))).item() == wanted


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_roi_align_is_torchvision_on_each_level(kernels, monkeypatch, count, size, sampling_ratio):
    monkeypatch.setattr(detection, "_ROI_BLOCK", 2**14)  # several blocks
    maps, (boxes, images, levels) = pyramid(), rois(count)
    found = torch.ops.elsa.roi_align(maps, boxes, images, levels, SCALES, size, sampling_ratio)
    assert found.shape == (count, 5, size, size)
    indexed = torch.cat((images[:, None].float(), boxes), 1)
    for level, (feature, scale) in enumerate(zip(maps, SCALES, strict=True)):
        rows = levels == level
        wanted = torchvision.ops.roi_align(
            feature, indexed[rows], size, scale, sampling_ratio, aligned=True
        )
        torch.testing.assert_close(found[rows], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_of_boxes_that_are_not_finite_is_zero(kernels, sampling_ratio):
    boxes = torch.tensor([[0.0, 0, float("nan"), 9], [0, float("-inf"), 4, 4], [9, 9, 1, 1]])
    index = torch.zeros(3, dtype=torch.int64)
    found = torch.ops.elsa.roi_align(pyramid(), boxes, index, index, SCALES, 7, sampling_ratio)
    assert not found[:2].any()
    assert found[2].any() == (sampling_ratio > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_and_scores_are_computed_in_float32(kernels, dtype):
    maps, arguments = pyramid(dtype=dtype), rois(50)
    found = torch.ops.elsa.roi_align(maps, *arguments, SCALES, 7, 2)
    wanted = torch.ops.elsa.roi_align([m.float() for m in maps], *arguments, SCALES, 7, 2)
    assert torch.equal(found, wanted.to(dtype))
    boxes, scores = random_boxes(1, 200).to(dtype), random_scores(1, 200).to(dtype)
    indices, values = torch.ops.elsa.nms(boxes, scores, 0.5, 0.1, 200)
    wanted = torch.ops.elsa.nms(boxes.float(), scores.float(), 0.5, 0.1, 200)
    assert values.dtype == dtype
    assert torch.equal(indices, wanted[0])


class Selection(nn.Module):
    """The three operators one after another, with detections of unknown number at the end."""

    def forward(self, boxes: Tensor, scores: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        values, order = torch.ops.elsa.topk(scores, 40)
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        indices, values = torch.ops.elsa.nms(boxes, values, 0.5, 0.3, 20)
        boxes = boxes.gather(1, indices[..., None].expand(-1, -1, 4))
        level = (indices % 3).flatten()
        image = torch.arange(boxes.shape[0]).repeat_interleave(20)
        all_of_them = torch.ops.elsa.roi_align(
            maps, boxes.flatten(0, 1), image, level, SCALES, 7, 0
        )
        rows = (values.flatten() > 0).nonzero().squeeze(1)
        boxes, image, level = boxes.flatten(0, 1)[rows], image[rows], level[rows]
        return all_of_them, torch.ops.elsa.roi_align(maps, boxes, image, level, SCALES, 14, 2)


def example(batch: int, count: int, side: int) -> tuple[Tensor, ...]:
    maps = [torch.randn(batch, 4, side // stride, side // stride + 1) for stride in (4, 8, 16)]
    return random_boxes(batch, count), random_scores(batch, count), *maps


def test_export_with_dynamic_sizes():
    dynamic = torch.export.Dim.DYNAMIC
    module = Selection()
    shapes = [{0: dynamic, 1: dynamic}] * 2 + [{0: dynamic, 2: dynamic, 3: dynamic}] * 3
    program = torch.export.export(
        module, example(2, 97, 128), dynamic_shapes=(*shapes[:2], tuple(shapes[2:]))
    )
    for batch, count, side in ((2, 97, 128), (1, 500, 64), (3, 30, 96), (4, 1, 256)):
        inputs = example(batch, count, side)
        for found, wanted in zip(program.module()(*inputs), module(*inputs), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["topk", "nms", "roi_align"])
def test_opcheck(name):
    arguments = {
        "topk": (random_scores(2, 30), 7),
        "nms": (random_boxes(2, 30), random_scores(2, 30), 0.5, 0.1, 9),
        "roi_align": (pyramid(), *rois(8), list(SCALES), 7, 2),
    }
    torch.library.opcheck(getattr(torch.ops.elsa, name).default, arguments[name])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torch.ops.elsa.topk(torch.zeros(3), 1), r"scores \[B, N\].* \[3\]"),
        (lambda: torch.ops.elsa.topk(torch.zeros(3, 2), -1), r"k >= 0.* -1"),
        (
            lambda: torch.ops.elsa.nms(torch.zeros(1, 3, 4), torch.zeros(1, 2), 0.5, 0.0, 1),
            r"scores \[B, N\].* \[1, 2\]",
        ),
        (
            lambda: torch.ops.elsa.nms(torch.zeros(3, 4), torch.zeros(3), 0.5, 0.0, 1),
            r"boxes \[B, N, 4\].* \[3, 4\]",
        ),
        (
            lambda: torch.ops.elsa.roi_align(pyramid(), *rois(2), [0.5], 7, 2),
            "as many scales.* 1 scales",
        ),
        (
            lambda: torch.ops.elsa.roi_align(
                pyramid(), *rois(2)[:2], torch.zeros(3).long(), SCALES, 7, 2
            ),
            r"levels \[R\].*\[3\]",
        ),
    ],
)
def test_shapes_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gradients_are_refused():
    scores = random_scores(1, 9).requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.ops.elsa.topk(scores, 3)[0].sum().backward()


@pytest.mark.slow
def test_torchvision_is_imported_by_calls_for_cuda_alone():
    code = (
        "import sys, elsa_core.detection as d; assert 'torchvision' not in sys.modules; "
        "assert not d.has_kernel('nms', 'cpu') and 'torchvision' not in sys.modules; "
        "sys.modules['torchvision'] = None; assert not d.has_kernel('nms', 'cuda')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.needs_cuda
def test_cuda_is_the_cpu(monkeypatch):
    scores = random_scores(2, 900, levels=50)
    calls = {
        "topk": (scores, 100),
        "nms": (random_boxes(2, 900), scores, 0.5, 0.1, 200),
        "roi_align": (pyramid(), *rois(200), list(SCALES), 7, 0),
    }

    def on_cuda(value):
        if isinstance(value, list):
            return [on_cuda(part) for part in value]
        return value.cuda() if isinstance(value, Tensor) else value

    for plain in (False, True):
        if plain:
            monkeypatch.setattr(detection, "has_kernel", lambda name, device_type: False)
        for name, arguments in calls.items():
            operator = getattr(torch.ops.elsa, name)
            found = operator(*map(on_cuda, arguments))
            wanted = operator(*arguments)
            for a, b in zip(
                *((x,) if isinstance(x, Tensor) else x for x in (found, wanted)), strict=True
            ):
                torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-5)
