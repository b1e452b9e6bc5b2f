"""Compares an exported file with PyTorch, in every executor that runs it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from elsa_tools.predict.executors import EXECUTORS, Executor
from elsa_tools.predict.inferencer import Inferencer
from elsa_tools.predict.results import Detections, Result
from elsa_tools.predict.runtime import RuntimeInferencer, resize_image
from elsa_tools.verify.compare import Outcome, compare
from elsa_tools.verify.image import drawn_image, read_image
from elsa_tools.verify.ties import TiesByIndex

from .models import Exportable

# Largest difference of arrays: of maps, which layer normalisation keeps near 1, absolute; of
# logits, relative to the largest.
TOLERANCE = 1e-4
# Of random images, height and width; the first two at a time. None is a multiple of 32.
SIZES = ((64, 96), (97, 71), (130, 161))
# Share of pixels that must get the same class.
AGREEMENT = 0.9999


@dataclass
class Check:
    """One comparison.

    Attributes:
        executor: that ran the file.
        what: the images: their files or shape.
        numbers: differences by name.
        same: whether all are small enough.
        seconds: that the executor took.
    """

    executor: str
    what: str
    numbers: dict[str, float] = field(default_factory=dict)
    same: bool = True
    seconds: float = 0.0

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in self.numbers.items())
        return f"{self.executor}, {self.what}: {'same' if self.same else 'DIFFERENT'} ({numbers})"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def executors(path: str) -> list[str]:
    """Those that are installed and run a file, by its ending; the first one must be there."""
    if path.endswith(".onnx"):
        return ["onnxruntime", *(["openvino"] if find_spec("openvino") else [])]
    return ["torch" if path.endswith(".pt2") else "openvino"]


def comparisons(
    path: str, module: Exportable, inferencer: Inferencer | None, images: Sequence[str] = ()
) -> int:
    """How many `verify` makes."""
    found = max(1, len(images)) if _is_end_to_end(module, inferencer) else 0
    return len(executors(path)) * (len(SIZES) + found)


def verify(
    path: str,
    module: Exportable,
    inferencer: Inferencer | None,
    images: Sequence[str] = (),
) -> Iterator[Check]:
    """Compares a file in each of its `executors` with the model that it was exported from.

    First arrays for random images of three `SIZES`, from ``module``; then, of detectors and
    segmentors, what is found in images, from the framework. Of a detector that pastes its masks,
    the images are resized before: the masks are the resized image's, and would differ at their
    borders once they are resampled.

    Args:
        inferencer: the framework's model with its test pipeline; None for a bare backbone.
        images: files; none: a drawn image.
    """
    end_to_end = _is_end_to_end(module, inferencer)
    wanted: list[tuple[str, np.ndarray, Result]] = []
    if end_to_end:
        assert inferencer is not None
        for name in images or ["a drawn image"]:
            pixels = (read_image(name) if images else drawn_image()).numpy()
            if getattr(module, "pasted", False):
                pixels = resize_image(inferencer.resize(), pixels)
            with TiesByIndex():
                wanted.append((name, pixels, inferencer.predict(pixels)))
    for name in executors(path):
        # A compiled program is code, but one that was made here.
        more = {"compiled": True} if name == "torch" else {}
        executor = EXECUTORS[name](path, "cpu", None, **more)
        yield from _compare_arrays(name, executor, module)
        if end_to_end:
            yield from _compare_results(name, RuntimeInferencer(executor), wanted)


def _is_end_to_end(module: Exportable, inferencer: Inferencer | None) -> bool:
    """Whether the framework's model finds what the exported one does; not for a bare backbone."""
    return inferencer is not None and inferencer.task == module.task


def _compare_arrays(name: str, executor: Executor, module: Exportable) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(0)
    for index, (height, width) in enumerate(SIZES):
        image = torch.randn((2 if index == 0 else 1, 3, height, width), generator=generator)
        image = image if module.normalised else (image * 58 + 116).clamp(0, 255)
        size = torch.tensor([[height, width], [height - 3, width - 5]])[: len(image)]
        given = (image, size)[: len(module.inputs)]
        with torch.no_grad():
            wanted = dict(zip(module.names, module(*given), strict=True))
        check = Check(name, f"random {'x'.join(map(str, image.shape))}")
        start = time.perf_counter()
        got = executor.run(*(value.numpy() for value in given))
        check.seconds = time.perf_counter() - start
        if module.task == "detection":
            for row in range(len(image)):
                _add(check, _outcome(got, row), _outcome(wanted, row))
        else:
            worst = max(float(np.abs(got[key] - wanted[key].numpy()).max()) for key in wanted)
            if module.task == "segmentation":
                worst /= max(float(wanted["logits"].abs().max()), 1e-12)
            check.numbers["difference"] = worst
            check.same = worst <= TOLERANCE
        yield check


def _outcome(arrays: Mapping[str, Any], row: int) -> Outcome:
    """What a detector's arrays say of the image ``row`` of a batch."""
    found = {name: torch.as_tensor(value) for name, value in arrays.items()}
    rows = found.pop("images") == row
    found = {name: value[rows] for name, value in found.items()}
    if "masks" in found:
        found["masks"] = found["masks"] >= (0.5 if found["masks"].dtype != torch.float32 else 0)
    return Outcome({}, **found)


def _compare_results(
    name: str, model: RuntimeInferencer, wanted: Sequence[tuple[str, np.ndarray, Result]]
) -> Iterator[Check]:
    for file, pixels, result in wanted:
        start = time.perf_counter()
        got = model.predict(pixels)
        check = Check(name, file, seconds=time.perf_counter() - start)
        if isinstance(result, Detections):
            assert isinstance(got, Detections)
            _add(check, _of_detections(got), _of_detections(result))
        else:
            assert not isinstance(got, Detections)
            agreement = float((got.labels == result.labels).mean())
            check.numbers["equal pixels"] = agreement
            check.same = agreement >= AGREEMENT
        yield check


def _of_detections(found: Detections) -> Outcome:
    masks = None if found.masks is None else torch.from_numpy(found.masks)
    boxes, scores, labels = map(torch.from_numpy, (found.boxes, found.scores, found.labels))
    return Outcome({}, boxes=boxes, scores=scores, labels=labels, masks=masks)


def _add(check: Check, got: Outcome, wanted: Outcome) -> None:
    """Adds what the detections of one image differ by to those of a batch."""
    found = compare(got, wanted)
    check.same = check.same and found.same
    for name, value in found.numbers.items():
        old = check.numbers.get(name)
        if old is None:
            check.numbers[name] = value
        elif name in ("unmatched", "detections"):
            check.numbers[name] = old + value
        else:
            check.numbers[name] = (min if name == "mask IoU" else max)(old, value)
