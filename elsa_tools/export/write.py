"""Writes a model in one of the formats, where what the file computes is what the model computes."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from elsa_core import __version__
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing_by_name, temporary_folder
from elsa_core.weights.write import sha256
from elsa_tools.predict.inferencer import Inferencer

from .models import Exportable
from .record import Record
from .verify import Check, comparisons, verify

if TYPE_CHECKING:
    from .quantise import Quantised

_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino")


def write_model(
    module: Exportable,
    record: Record,
    path: str,
    *,
    inferencer: Inferencer | None = None,
    images: Sequence[str] = (),
    verified: bool = True,
    calibration: str | None = None,
    compiled: bool = False,
    bar: Any = None,
) -> tuple[list[Check], Quantised | None]:
    """Writes ``path``, in the format of its ending, and ``path``.report.json beside it.

    Returns the comparisons with PyTorch, and of an int8 model what was quantised; the float model
    is compared then.

    Args:
        inferencer: the framework's model, for the comparison.
        images: files to compare on; see `verify`.
        verified: False writes the file without comparing it.
        calibration: folder of images, for an int8 model.
        compiled: compile a .pt2 file by AOTInductor.
        bar: a progress bar of tqdm, which is reset and counts the steps.

    Raises:
        UsageError: the model cannot be exported or written, or an executor computes something
            else; then what was at ``path`` stays.
    """
    if record.task == "features":
        record = replace(record, outputs=module.names)
    checks: list[Check] = []
    ending = os.path.splitext(path)[1]
    by_onnx = ending == ".xml" or calibration is not None
    steps = 1 + by_onnx
    if verified:
        compared = path if calibration is None else "model.onnx"
        steps += comparisons(compared, module, inferencer, images)
    bar = tqdm(disable=True) if bar is None else bar
    bar.reset(total=steps)
    bar.set_description_str("compiling" if compiled else "tracing")

    def check(part: str) -> None:
        bar.update()
        if not verified:
            return
        bar.set_description_str("comparing")
        for found in verify(part, module, inferencer, images):
            bar.set_description_str(str(found))
            bar.update()
            checks.append(found)
        if wrong := [str(found) for found in checks if not found.same]:
            raise UsageError(
                f"{path} was not written, it must compute what PyTorch does: {wrong[0]}; "
                "--no-verify writes it all the same"
            )

    with replacing_by_name(report_path(path)) as report:
        _reserve(report, len(images))
        quantised = None
        if by_onnx:
            from .onnx import write_onnx

            with temporary_folder() as folder:
                middle = os.path.join(folder, "model.onnx")
                with replacing_by_name(middle) as part:
                    write_onnx(module, part, record)
                if calibration is not None:
                    from .quantise import quantise

                    check(middle)
                    bar.set_description_str("quantising")
                    quantised = quantise(middle, path, calibration)
                    bar.update()
                else:
                    from .openvino import to_openvino

                    bar.update()
                    bar.set_description_str("converting")
                    to_openvino(middle, path, check=check)
        elif ending == ".pt2":
            from .program import compile_program, save_program

            save = compile_program if compiled else save_program
            save(module, path, record.to_json(), check)
        else:
            with replacing_by_name(path) as part:
                from .onnx import write_onnx

                write_onnx(module, part, record)
                check(part)
        _write_report(report, path, record, checks, quantised)
    return checks, quantised


def report_path(path: str) -> str:
    return f"{path}.report.json"


def _reserve(report: str, images: int) -> None:
    """Takes the report's place on the disk, so that it does not fail behind a complete model."""
    with open(report, "wb") as file:
        file.write(b" " * (2**16 + 2**11 * images))
        file.flush()
        os.fsync(file.fileno())


def _write_report(
    report: str, path: str, record: Record, checks: Sequence[Check], quantised: Quantised | None
) -> None:
    versions = {"elsa-swin": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    content = {
        "schema": 1,
        "file": os.path.basename(path),
        "sha256": sha256(path),
        "record": json.loads(record.to_json()),
        "int8": None if quantised is None else asdict(quantised),
        "versions": versions,
        "verified": bool(checks),
        "checks": [check.to_dict() for check in checks],
    }
    with open(report, "r+b") as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
        file.truncate()
