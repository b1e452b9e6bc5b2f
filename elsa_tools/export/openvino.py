"""OpenVINO models of exported ONNX files: a pair of files, .xml with the graph and .bin with the
weights.

OpenVINO computes in bfloat16 where the processor can, unless it is told otherwise: class scores
then differ in the second digit. `load_openvino` tells it to compute in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openvino as ov

from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.runtime.files import replacing_by_name, temporary_folder
from elsa_core.weights.write import sha256

from .openvino_ops import follow_onnx
from .record import KEY, Record, onnx_record

# Key in the model's rt_info, beside the record's: the SHA-256 of the .bin file.
WEIGHTS = "elsa_weights"
# Stands for the digest until the weights are written.
_NO_DIGEST = "?" * 64


def to_openvino(onnx_path: str, path: str, check: Callable[[str], object] | None = None) -> None:
    """Write an exported ONNX file as an OpenVINO model, which stores weights as the file does.

    Args:
        path: the .xml file; weights go to the .bin file beside it. Both are written, or neither.
        check: called with the path of the complete model before it gets its name. If it raises, the
            files at ``path`` do not change.

    Raises:
        UsageError: the file has no record, OpenVINO cannot read it, or ``path`` cannot be written.
    """
    model, record = read_exported(onnx_path)
    write_openvino(model, path, record, check)


def read_exported(path: str) -> tuple[ov.Model, Record]:
    """Read an exported model, an .onnx or .xml file, and its record.

    Raises UsageError if OpenVINO cannot read it, if it has no record, or if an .xml file and its
    .bin file are incomplete or come from two exports.
    """
    if path.endswith(".onnx"):
        record = onnx_record(path)
        model = _read(path)
        follow_onnx(model)
        return model, record
    weights = weights_path(path)
    for part in (path, weights):
        if not os.path.isfile(part):
            raise UsageError(f"an OpenVINO model is a pair of files, {part} is missing")
    model = _read(path)
    if not (model.has_rt_info([KEY]) and model.has_rt_info([WEIGHTS])):
        raise UsageError(f"{path} must be a model of `elsa export`, it has no record")
    if model.get_rt_info([WEIGHTS]).astype(str) != sha256(weights):
        raise UsageError(f"{path} and {weights} must come from one export, they do not")
    return model, Record.from_json(model.get_rt_info([KEY]).astype(str))


def compile_model(model: ov.Model, threads: int | None = None) -> ov.CompiledModel:
    """Compile a model for the processor, to compute in float32."""
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    return ov.Core().compile_model(model, "CPU", settings)


def load_openvino(path: str, threads: int | None = None) -> tuple[ov.CompiledModel, Record]:
    """Return a compiled model and its record; errors as of `read_exported`."""
    model, record = read_exported(path)
    return compile_model(model, threads), record


def write_openvino(
    model: ov.Model,
    path: str,
    record: Record,
    check: Callable[[str], object] | None = None,
) -> None:
    """Write a model and its record; the rest as in `to_openvino`."""
    if not path.endswith(".xml"):
        raise UsageError(f"the name of an OpenVINO model must end in .xml, got {path}")
    model.set_rt_info(record.to_json(), [KEY])
    model.set_rt_info(_NO_DIGEST, [WEIGHTS])
    with _pair(path) as name:
        try:
            # Compressed, anchors and the image's mean would be rounded, too.
            ov.save_model(model, name, compress_to_fp16=False)
        except RuntimeError as error:
            raise UsageError(f"{path} cannot be written: {one_line(error)[:200]}") from error
        _set_digest(name)
        # OpenVINO does not notice a full disk while it writes.
        _read(name)
        if check is not None:
            check(name)


def weights_path(path: str) -> str:
    """The .bin file of an .xml file."""
    return f"{os.path.splitext(path)[0]}.bin"


def _read(path: str) -> ov.Model:
    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        raise UsageError(f"OpenVINO cannot read {path}: {one_line(error)[:300]}") from error


@contextmanager
def _pair(path: str) -> Iterator[str]:
    """Yield the name of an .xml file; it and the .bin file beside it get their names at the end.

    OpenVINO names the weights after the graph, which temporary files cannot be: links are.
    """
    with (
        replacing_by_name(path) as graph,
        replacing_by_name(weights_path(path)) as weights,
        temporary_folder() as folder,
    ):
        name = os.path.join(folder, "model.xml")
        os.symlink(os.path.abspath(graph), name)
        os.symlink(os.path.abspath(weights), weights_path(name))
        yield name


def _set_digest(path: str) -> None:
    with open(path, "r+b") as file:
        text = file.read()
        assert text.count(_NO_DIGEST.encode()) == 1
        file.seek(text.index(_NO_DIGEST.encode()))
        file.write(sha256(weights_path(path)).encode())
