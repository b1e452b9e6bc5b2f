"""int8 models by post-training quantisation, of OpenVINO models (NNCF) or ONNX files (onnxruntime).

Convolutions and products with weights become int8; norms, softmax, the attention of ELSA, box
decoding, suppression and RoIAlign compute in float32. A part of the model that costs too much
accuracy (`PARTS`) stays in float32 altogether.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from elsa_core.runtime.command_line import keep_inputs
from elsa_core.runtime.errors import UsageError

from .calibration import Images, Run, agreement, summary
from .quantiser import Quantiser
from .record import Record

# Agreement with the float model that a quantised model must reach. Detectors of the digits that
# agree to 0.93 have the float model's box AP and mask AP within 0.4 points.
LEAST_AGREEMENT = 0.9
# Images of those for calibration on which agreement and time are measured.
MEASURED = 50


@dataclasses.dataclass(frozen=True)
class Quantised:
    """What `quantise` has done.

    Attributes:
        int8, float32: names of the parts that are int8, and of those left in float32.
        losses: agreement lost by each part alone; empty where all parts are int8.
        agreement: with the float model (`elsa_tools.export.calibration.agreement`).
        images: number of images used for calibration.
        seconds: of the float and of the int8 model for one image, median.
        sizes: of their files, in bytes.
    """

    int8: tuple[str, ...]
    float32: tuple[str, ...]
    losses: dict[str, float]
    agreement: float
    images: int
    seconds: tuple[float, float]
    sizes: tuple[int, int]

    def __str__(self) -> str:
        left = ", ".join(f"{name} (alone loses {self.losses[name]:.1%})" for name in self.float32)
        times, sizes = self.seconds, self.sizes
        return (
            f"int8: {', '.join(self.int8)}; left in float32: {left or 'no part'}\n"
            f"agreement with the float model: {self.agreement:.1%} on {self.images} images\n"
            f"time per image: {times[0] * 1e3:.1f} -> {times[1] * 1e3:.1f} ms, "
            f"size: {sizes[0] / 1e6:.1f} -> {sizes[1] / 1e6:.1f} MB"
        )


def quantise(
    path: str,
    out: str,
    folder: str,
    *,
    images: int = 200,
    least: float = LEAST_AGREEMENT,
    threads: int | None = None,
    check: Callable[[str], object] | None = None,
    progress: bool = True,
) -> Quantised:
    """Write an int8 model of an exported float model.

    If the model with all parts in int8 agrees less than ``least`` with the float model, the parts
    that cost most agreement alone stay in float32, one after the other, until it does.

    Args:
        path: .onnx file, or .xml file of OpenVINO.
        out: .xml for OpenVINO, .onnx for onnxruntime (from an .onnx file).
        folder: images for calibration, like those that the model will see. Images in which a
            detector finds nothing are left out.
        images: how many of them to use at most.
        threads: with which agreement and time are measured.
        check: called with the path of the complete model before it gets its name, see
            `elsa_tools.export.openvino.to_openvino`.
        progress: whether to show a bar on a terminal.

    Raises:
        UsageError: the model is no float model of ``elsa export``, the folder holds nothing of use,
            no part can be int8, or ``out`` cannot be written.
    """
    quantiser = _quantiser(path, out)
    record = quantiser.record
    if record.precision != "float32":
        raise UsageError(f"{path} must be a float32 model, it is {record.precision}")
    used = Images(folder, record, images)
    with tqdm(desc="calibrating", disable=None if progress else True) as bar:
        search = _Search(quantiser, used, threads, bar)
        names, model, reached, seconds = search.run(least)
    result = dataclasses.replace(record, precision="int8")
    size = quantiser.write(model, out, result, check)
    return Quantised(
        int8=tuple(name for name in quantiser.parts if name in names),
        float32=tuple(name for name in quantiser.parts if name not in names),
        losses=search.losses,
        agreement=reached,
        images=len(used),
        seconds=(search.seconds, seconds),
        sizes=(quantiser.size(), size),
    )


class _Search:
    """Looks for the parts that can be int8.

    Args:
        images: loses those in which a detector finds nothing.
    """

    def __init__(self, quantiser: Quantiser, images: Images, threads: int | None, bar: Any) -> None:
        self.quantiser, self.images, self.threads, self.bar = quantiser, images, threads, bar
        self.losses: dict[str, float] = {}
        bar.reset(total=len(images))
        bar.set_description("float model")
        files, wanted, seconds = [], [], []
        run = quantiser.runner(None, threads)
        for file in images.files:
            found, time_taken = _timed(quantiser.record, run, images.read(file))
            bar.update()
            if quantiser.record.task != "detection" or len(found["boxes"]):
                files.append(file)
                wanted.append(found)
                seconds.append(time_taken)
        if not files:
            raise UsageError(
                "calibration needs images in which the model finds something, it finds nothing in "
                f"the {len(images)} images"
            )
        images.files, self.wanted = files, wanted[:MEASURED]
        self.seconds = statistics.median(seconds)

    def run(self, least: float) -> tuple[set[str], Any, float, float]:
        """The parts, the model, its agreement and its seconds per image."""
        parts = self.quantiser.parts
        names = set(parts)
        model, reached, seconds = self._try(names)
        if reached >= least:
            return names, model, reached, seconds
        self.losses = {name: 1 - self._try({name})[1] for name in parts}
        for name in sorted(parts, key=lambda name: -self.losses[name])[:-1]:
            names.remove(name)
            model, reached, seconds = self._try(names)
            if reached >= least:
                return names, model, reached, seconds
        raise UsageError(
            f"an int8 model must agree to {least:.1%} with the float model, it does to "
            f"{reached:.1%} even with the {', '.join(names)} alone in int8"
        )

    def _try(self, names: set[str]) -> tuple[Any, float, float]:
        chosen = [name for part in sorted(names) for name in self.quantiser.parts[part]]
        self.bar.reset(total=len(self.images) + len(self.wanted))
        self.bar.set_description(f"int8 {', '.join(sorted(names))}"[:60])
        model = self.quantiser.quantised(chosen, self.images, self.bar)
        run = self.quantiser.runner(model, self.threads)
        found, seconds = [], []
        for file in self.images.files[: len(self.wanted)]:
            one, time_taken = _timed(self.quantiser.record, run, self.images.read(file))
            found.append(one)
            seconds.append(time_taken)
            self.bar.update()
        reached = agreement(self.quantiser.record, self.wanted, found)
        return model, reached, statistics.median(seconds)


def _quantiser(path: str, out: str) -> Quantiser:
    keep_inputs("the int8 model", out, [path])
    ending, target = (os.path.splitext(name)[1] for name in (path, out))
    if ending not in (".onnx", ".xml"):
        raise UsageError(f"the float model must end in .onnx or .xml, got {path}")
    if target == ".xml":
        from .quantise_openvino import OpenVINO

        return OpenVINO(path)
    if target == ending == ".onnx":
        from .quantise_onnx import OnnxRuntime

        return OnnxRuntime(path)
    raise UsageError(f"the int8 model of {path} must end in {_TARGETS[ending]}, got {out}")


_TARGETS = {".onnx": ".xml or .onnx", ".xml": ".xml"}


def _timed(record: Record, run: Run, inputs: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    outputs = run(inputs)
    seconds = time.perf_counter() - start
    return summary(record, outputs), seconds
