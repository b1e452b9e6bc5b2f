"""Exported models behind one interface: ONNX by onnxruntime, .pt2 by PyTorch, .xml by OpenVINO.

Needs none of the frameworks, and of the executors the one of the file.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.runtime.packages import need
from elsa_tools.export.record import KEY, Record

_CUDA = "CUDAExecutionProvider"
DETECTION, MASKS = ("boxes", "scores", "labels", "images"), "masks"


class Executor(ABC):
    """A loaded model.

    Attributes:
        path: its file.
        record: what the file says about the model.
        inputs: their names, "image" and for detectors "size".
        outputs: their names, in order.
    """

    def __init__(
        self, path: str, record: Record, inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        self.path, self.record = path, record
        self.inputs, self.outputs = list(inputs), list(outputs)
        wanted_inputs, wanted_outputs = _names(self.record)
        for what, names, wanted in (
            ("inputs", self.inputs, wanted_inputs),
            ("outputs", self.outputs, wanted_outputs),
        ):
            if wanted and sorted(names) != sorted(wanted):
                raise UsageError(
                    f"the {what} of {path}, a model for {self.record.task}, must be "
                    f"{', '.join(wanted)}, got {', '.join(names)}"
                )

    def run(self, image: np.ndarray, size: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """All outputs by name.

        Args:
            image: [B, 3, H, W], float32, RGB.
            size: [B, 2], int64: height and width of each image, the rest of H x W is padding; None:
                H and W of all.

        Raises UsageError for other shapes, dtypes or sizes, of which some executors make something.
        """
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape or image.dtype != np.float32:
            raise UsageError(
                f"image must be float32 [B, 3, H, W], got {image.dtype} {list(image.shape)}"
            )
        if size is None:
            size = np.tile(np.array(image.shape[2:], dtype=np.int64), (len(image), 1))
        if size.shape != (len(image), 2) or size.dtype != np.int64:
            raise UsageError(
                f"size must be int64 {[len(image), 2]}, got {size.dtype} {list(size.shape)}"
            )
        if (size < 1).any() or (size > image.shape[2:]).any():
            raise UsageError(
                f"size must be from 1 to the {list(image.shape[2:])} of image, got {size.tolist()}"
            )
        given = {"image": image, "size": size}
        found = self._run({name: given[name] for name in self.inputs})
        return dict(zip(self.outputs, found, strict=True))

    @abstractmethod
    def _run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs in order."""


class OnnxRuntime(Executor):
    """Of an ONNX file."""

    def __init__(self, path: str, device: str | None, threads: int | None) -> None:
        onnxruntime: Any = need("onnxruntime", f"running {path}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        if threads is not None:
            options.intra_op_num_threads = threads
        there = _CUDA in onnxruntime.get_available_providers()
        kind, _, index = (device or ("cuda" if there else "cpu")).partition(":")
        if kind not in ("cpu", "cuda") or (kind == "cuda" and not there):
            raise UsageError(
                f"--device must be one that this onnxruntime has, {'cpu, cuda' if there else 'cpu'}"
                f", got {device}"
            )
        providers = [(_CUDA, {"device_id": index or "0"})] if kind == "cuda" else []
        try:
            self.session = onnxruntime.InferenceSession(
                path, options, providers=[*providers, "CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own kinds have no common base
            raise _unreadable(path, "onnxruntime", error) from error
        if device is not None and providers and _CUDA not in self.session.get_providers():
            raise UsageError(f"--device {device} cannot be used by this onnxruntime")
        record = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        super().__init__(
            path,
            _parse(path, record),
            [value.name for value in self.session.get_inputs()],
            [value.name for value in self.session.get_outputs()],
        )

    def _run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        found: list[np.ndarray] = self.session.run(self.outputs, inputs)
        return found


class OpenVino(Executor):
    """Of an .xml file with its .bin file; computes in float32 on the CPU."""

    def __init__(self, path: str, device: str | None, threads: int | None) -> None:
        need("openvino", f"running {path}")
        from elsa_tools.export.openvino import load_openvino

        if device not in (None, "cpu"):
            raise UsageError(f"--device must be cpu for a model of OpenVINO, got {device}")
        self.compiled, record = load_openvino(path, threads)
        inputs, outputs = (
            [value.get_any_name() for value in values]
            for values in (self.compiled.inputs, self.compiled.outputs)
        )
        super().__init__(path, record, inputs, outputs)

    def _run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(self.compiled(inputs).values())


class Torch(Executor):
    """Of a .pt2 file; on the CPU."""

    def __init__(
        self, path: str, device: str | None, threads: int | None, compiled: bool = False
    ) -> None:
        import torch

        from elsa_tools.export.program import load_program

        if device not in (None, "cpu"):
            raise UsageError(f"--device must be cpu for a .pt2 file, got {device}")
        self.program = load_program(path, compiled)
        if threads is not None:
            torch.set_num_threads(threads)
        record = _parse(path, self.program.record)
        inputs, outputs = _names(record)
        super().__init__(path, record, inputs, outputs)

    def _run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        import torch

        given = (torch.from_numpy(np.ascontiguousarray(value)) for value in inputs.values())
        return [output.numpy() for output in self.program(*given)]


EXECUTORS: dict[str, type[OnnxRuntime | OpenVino | Torch]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "torch": Torch,
}
_BY_ENDING = {".onnx": "onnxruntime", ".pt2": "torch", ".xml": "openvino"}
ENDINGS = tuple(_BY_ENDING)


def load_executor(
    path: str, device: str | None = None, threads: int | None = None, compiled: bool = False
) -> Executor:
    """Loads an exported model.

    Args:
        path: an .onnx, .pt2 or .xml file that ``elsa export`` has written.
        device: "cpu" or "cuda"; None: what the executor prefers.
        threads: of one run on the CPU; None: as many as the executor likes. PyTorch's are those of
            the process.
        compiled: run a .pt2 file of AOTInductor, too: machine code, which nothing can check.

    Raises:
        UsageError: a file that is missing, of another kind or without a record, a missing package,
            or a device that the executor does not have.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in _BY_ENDING:
        raise UsageError(f"the model must be a file {' or '.join(ENDINGS)}, got {path}")
    if not os.path.isfile(path):
        raise UsageError(f"the model {path} does not exist")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    if ending == ".pt2":
        return Torch(path, device, threads, compiled)
    return EXECUTORS[_BY_ENDING[ending]](path, device, threads)


def _names(record: Record) -> tuple[Sequence[str], Sequence[str]]:
    """Of inputs and outputs; of a backbone's outputs those that the record names."""
    if record.task == "detection":
        return ("image", "size"), (*DETECTION, *([MASKS] if record.masks else []))
    return ("image",), ("logits",) if record.task == "segmentation" else record.outputs


def _parse(path: str, record: str | None) -> Record:
    if record is None:
        raise UsageError(f"{path} was not written by `elsa export`: it has no record {KEY!r}")
    try:
        return Record.from_json(record)
    except UsageError as error:
        raise UsageError(f"{path} cannot be run: {error}") from error


def _unreadable(path: str, executor: str, error: Exception) -> UsageError:
    return UsageError(f"{path} cannot be loaded by {executor}: {one_line(error)[:300]}")
