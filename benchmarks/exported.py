"""Mask R-CNN around both backbones in onnxruntime and OpenVINO: ``python -m benchmarks.exported``.

The graphs are those of `elsa_tools.export`, of one size of image, with the same heads. Their RPN
and box head compute as usual and then give the values of `benchmarks.detectors`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elsa_core import ELSASwin
from elsa_core.weights.shapes import HeadSizes
from elsa_tools.export.detector import Detector, Settings
from elsa_tools.export.models import Backbone
from elsa_tools.export.onnx import write_onnx
from elsa_tools.export.record import Record

from . import detectors
from .clock import Clock

SIZES = HeadSizes(80, 256, "", 3, 1024, 0, None, 2, 4, 256, 1)
"""Of Mask R-CNN's heads."""

Shape = detectors.Shape
Infer = Callable[[], list[np.ndarray]]


class SameRows(nn.Module):
    """Computes a linear layer and gives the first rows of ``values`` [N, K] instead."""

    values: Tensor

    def __init__(self, layer: nn.Module, values: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("values", values)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        rows = torch.arange(out.shape[0], device=out.device)
        return torch.add(self.values[rows], out, alpha=detectors.TRIFLE)


class _OfOneSize:
    """Exports the shape ``images`` alone; the stock backbone is traced as it is."""

    images: Shape
    backbone: Any

    def example(self) -> tuple[Tensor, ...]:
        image = torch.zeros(self.images)
        size = torch.tensor([self.images[2:]] * self.images[0])
        return (image, size)[: len(self.inputs)]  # type: ignore[attr-defined]

    def dynamic_shapes(self) -> None:
        return None

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.backbone, ELSASwin):
            return super().features(image)  # type: ignore[misc]
        return tuple(self.backbone(image))


class FixedDetector(_OfOneSize, Detector):
    """A detector for one shape of images."""


class FixedBackbone(_OfOneSize, Backbone):
    """A backbone for one shape of images."""


def settings(model: Any) -> Settings:
    from elsa_tools.export.mm import read_settings

    return read_settings(
        SimpleNamespace(model=model, normalisation=lambda: ([0.0] * 3, [1.0] * 3))
    )[0]


def modules(name: str, which: str, images: Shape) -> dict[str, nn.Module]:
    """The exported forms of a contender: the backbone alone and the whole detector."""
    model = detectors.detector(name, which)
    backbone: Any = model.backbone
    if which != "elsa":
        backbone.in_chans = 3
    torch.manual_seed(0)
    whole = FixedDetector(backbone, SIZES, settings(model), normalised=True)
    rpn, (box,) = whole.rpn_head, whole.roi_head.bbox_head
    rpn.rpn_cls = detectors.SameOutputs(rpn.rpn_cls, detectors.objectness)
    rpn.rpn_reg = detectors.SameOutputs(rpn.rpn_reg, detectors.deltas)
    rows = detectors.PROPOSALS * images[0]
    box.fc_cls = SameRows(box.fc_cls, detectors.classes((rows, 81)))
    box.fc_reg = SameRows(box.fc_reg, detectors.deltas((rows, 320)))
    alone = FixedBackbone(backbone, None)
    whole.images = alone.images = images
    return {"backbone": alone.eval(), "whole": whole.eval()}


def onnxruntime_infer(path: str, inputs: dict[str, np.ndarray], threads: int) -> Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def openvino_infer(path: str, inputs: dict[str, np.ndarray], threads: int) -> Infer:
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", hints).create_infer_request()

    def infer() -> list[np.ndarray]:
        found = request.infer(inputs)
        return [found[output] for output in request.model_outputs]

    return infer


EXECUTORS = {"onnxruntime": onnxruntime_infer, "openvino": openvino_infer}


def check_equal_work(found: dict[str, list[np.ndarray]], images: Shape) -> None:
    """Checks that all have the same 100 detections of an image, each with a mask.

    Raises:
        RuntimeError: they do unequal work.
    """
    (first, ours), *others = found.items()
    count = detectors.DETECTIONS * images[0]
    if ours[4].shape != (count, 28, 28):
        raise RuntimeError(f"{first} must have {count} masks, got {ours[4].shape}")
    for other, theirs in others:
        same = all(map(np.array_equal, ours[2:4], theirs[2:4]))
        if not same or ours[4].shape != theirs[4].shape or not np.allclose(ours[0], theirs[0]):
            raise RuntimeError(f"the heads of {first} and {other} must do equal work")


def measure(
    name: str, images: Shape, executors: Sequence[str], threads: int, rounds: int
) -> list[str]:
    """Times the contenders in turns; a line for each part and executor."""
    clock = Clock(torch.device("cpu"))
    lines = []
    inputs = {
        "image": torch.randn(images).numpy(),
        "size": np.array([images[2:]] * images[0], dtype=np.int64),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[tuple[str, str], str] = {}
        for which in detectors.CONTENDERS:
            for part, module in modules(name, which, images).items():
                with torch.no_grad():
                    module(*module.example())
                paths[part, which] = os.path.join(folder, f"{part} {which}.onnx")
                write_onnx(module, paths[part, which], Record(task=module.task))  # type: ignore[arg-type]
        for executor in executors:
            for part in ("backbone", "whole"):
                given = inputs if part == "whole" else {"image": inputs["image"]}
                infer = {
                    which: EXECUTORS[executor](paths[part, which], given, threads)
                    for which in detectors.CONTENDERS
                }
                found = {which: run() for which, run in infer.items()}
                if part == "whole":
                    check_equal_work(found, images)
                times: dict[str, list[float]] = {which: [] for which in infer}
                for _ in range(rounds):
                    for which, run in infer.items():
                        times[which].append(1e3 * clock.time(run))
                ours, stock = (statistics.median(times[w]) for w in detectors.CONTENDERS)
                lines.append(f"{executor},{part},{images},{threads},{ours:.1f},{stock:.1f}")
                case = f"{executor:12} {part:9} batch {images[0]}, {threads} threads"
                figures = f"elsa {ours:8.1f} ms, stock swin {stock:8.1f} ms"
                print(f"{case}: {figures}, ratio {ours / stock:.3f}", flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exported", description=__doc__)
    parser.add_argument("--variant", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--executor", nargs="+", choices=EXECUTORS, default=list(EXECUTORS))
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as CSV, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    images = (options.batch, 3, *options.size)
    lines = measure(options.variant, images, options.executor, options.threads, options.rounds)
    if options.out:
        options.out.write_text("executor,part,images,threads,elsa_ms,stock_ms\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
