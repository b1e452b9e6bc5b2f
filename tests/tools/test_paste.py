"""Pasted masks against Detectron2's and MMDetection's."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from elsa_tools.export.paste import paste
from elsa_tools.predict import paste as numpy_paste
from elsa_tools.predict.paste import paste_masks

SIZE = (90, 120)


def instances(count=300, seed=0):
    """Smooth logits [N, 28, 28] and boxes [N, 4], some beyond the image, some below a pixel.

    All touch the image: the frameworks fail where a box does not.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 7, 7, generator=generator) * 4
    masks = nn.functional.interpolate(coarse, (28, 28), mode="bicubic")[:, 0]
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([135.0, 105.0]) - 15
    side = torch.rand(count, 2, generator=generator) ** 3 * 100 + 0.05
    return masks, torch.cat((corner, (corner + side).clamp(min=0.1)), 1)


def of_detectron2(masks, boxes, size, threshold):
    mask_ops = pytest.importorskip("detectron2.layers.mask_ops")
    return mask_ops.paste_masks_in_image(masks.sigmoid(), boxes, size, threshold)


def of_mmdet(masks, boxes, size, threshold):
    head = pytest.importorskip("mmdet.models.roi_heads.mask_heads.fcn_mask_head")
    out = torch.zeros(len(masks), *size, dtype=torch.bool)
    for index in range(len(masks)):
        one = slice(index, index + 1)
        part, place = head._do_paste_mask(masks[one, None].sigmoid(), boxes[one], *size)
        out[(one, *place)] = part >= threshold
    return out


def of_the_graph(masks, boxes, size, threshold):
    return paste(masks, boxes, *size, threshold)


@pytest.mark.parametrize("threshold", [0.5, 0.3])
@pytest.mark.parametrize("theirs", [of_detectron2, of_mmdet, of_the_graph])
def test_pixels_are_the_same(theirs, threshold):
    masks, boxes = instances()
    wanted = theirs(masks, boxes, SIZE, threshold).numpy()
    found = paste_masks(masks.numpy(), boxes.numpy(), SIZE, threshold)
    assert found.shape == wanted.shape and found.dtype == bool
    assert wanted.any((1, 2)).mean() > 0.5
    # Rounding, of values at the threshold.
    assert (found != wanted).sum() <= 2e-5 * wanted.sum()
    shared, either = (found & wanted).sum((1, 2)), (found | wanted).sum((1, 2))
    assert (shared[either > 0] / either[either > 0]).min() > 0.999


@pytest.mark.parametrize("function", ["numpy", "graph"])
def test_boxes_without_pixels_give_empty_masks(function):
    nan, inf = float("nan"), float("inf")
    boxes = [
        [5, 5, 5, 9],
        [5, 9, 9, 9],
        [9, 9, 5, 5],
        [-50, 2, -20, 9],
        [200, 2, 300, 9],
        [2, 100, 9, 300],
        [1e30, 2, 2e30, 9],
        [nan, 2, 9, 9],
        [2, 2, inf, 9],
        [-inf, 2, inf, 9],
        [nan] * 4,
    ]
    masks, boxes = np.full((len(boxes), 28, 28), 9, np.float32), np.array(boxes, np.float32)
    if function == "numpy":
        pasted = paste_masks(masks, boxes, SIZE)
    else:
        pasted = paste(torch.from_numpy(masks), torch.from_numpy(boxes), *SIZE).numpy()
    assert pasted.shape == (len(boxes), *SIZE)
    assert not pasted.any()


@pytest.mark.filterwarnings("error")
def test_extreme_logits_half_precision_and_no_masks():
    box = np.array([[10, 10, 20, 20]], np.float16)
    for value, area in ((-6e4, 0), (6e4, 100)):
        assert paste_masks(np.full((1, 28, 28), value, np.float16), box, SIZE).sum() == area
    assert paste_masks(np.zeros((0, 28, 28)), np.zeros((0, 4)), SIZE).shape == (0, *SIZE)
    with pytest.raises(ValueError, match=r"boxes \[N, 4\], got \[2, 28, 28\] and \[1, 4\]"):
        paste_masks(np.zeros((2, 28, 28)), box, SIZE)


def test_memory_is_bounded(monkeypatch):
    masks, boxes = np.full((3, 28, 28), 5, np.float32), np.array([[-9, -9, 3000, 3000]] * 3)
    whole = paste_masks(masks, boxes, (2000, 2000))
    monkeypatch.setattr(numpy_paste, "_MOST", 2**16)
    tracemalloc.start()
    try:
        in_parts = paste_masks(masks, boxes, (2000, 2000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(in_parts, whole)
    assert peak < whole.nbytes + 2e6


class Paste(nn.Module):
    def forward(self, masks, boxes, image):
        return paste(masks, boxes, image.shape[2], image.shape[3])


def test_the_graph_pastes_at_any_size(tmp_path):
    dynamic, path = torch.export.Dim.DYNAMIC, tmp_path / "paste.onnx"
    masks, boxes = instances(9)
    shapes = ({0: dynamic}, {0: dynamic}, {0: dynamic, 2: dynamic, 3: dynamic})
    program = torch.onnx.export(
        Paste().eval(),
        (masks, boxes, torch.zeros(2, 3, 50, 70)),
        dynamo=True,
        opset_version=20,
        input_names=["masks", "boxes", "image"],
        dynamic_shapes=shapes,
        verbose=False,
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count, size in ((9, SIZE), (0, SIZE), (1, (30, 200))):
        masks, boxes = instances(count, seed=count)
        inputs = {"masks": masks, "boxes": boxes, "image": torch.zeros(1, 3, *size)}
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        wanted = paste_masks(masks.numpy(), boxes.numpy(), size)
        assert found.shape == wanted.shape and found.dtype == bool
        assert (found != wanted).sum() <= 2e-5 * wanted.sum()
