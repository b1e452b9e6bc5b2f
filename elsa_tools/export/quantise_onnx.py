"""int8 ONNX files, by onnxruntime: with QuantizeLinear and DequantizeLinear, standard operators."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Collection
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from elsa_core.runtime.files import replacing_by_name

from .calibration import Arrays, Images, Run
from .quantiser import Quantiser, part_of, without_output
from .record import KEY, Record, onnx_record

# Operators with weights; their second input.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class _Reader(CalibrationDataReader):
    def __init__(self, images: Images, bar: Any) -> None:
        self.images, self.bar = iter(images), bar

    def get_next(self) -> Arrays | None:
        self.bar.update()
        return next(self.images, None)


class OnnxRuntime(Quantiser):
    def __init__(self, path: str) -> None:
        self.path, self.record = path, onnx_record(path)
        model = onnx.load(path)
        weights = {tensor.name for tensor in model.graph.initializer}
        self.parts: dict[str, list[str]] = {}
        for node in model.graph.node:
            if node.op_type in WEIGHTED and node.input[1] in weights and not _grouped(node):
                self.parts.setdefault(part_of(node.input[1]), []).append(node.name)

    def quantised(self, names: Collection[str], images: Images, bar: Any) -> onnx.ModelProto:
        level = logging.root.level
        with tempfile.TemporaryDirectory() as folder, without_output():
            target = os.path.join(folder, "int8.onnx")
            logging.root.setLevel(logging.ERROR)
            try:
                quantize_static(
                    self.path,
                    target,
                    _Reader(images, bar),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    nodes_to_quantize=list(names),
                )
            finally:
                logging.root.setLevel(level)
            return onnx.load(target)

    def runner(self, model: onnx.ModelProto | None, threads: int | None) -> Run:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        source = self.path if model is None else model.SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(inputs: Arrays) -> Arrays:
            return dict(zip(names, session.run(names, inputs), strict=True))

        return run

    def write(
        self,
        model: onnx.ModelProto,
        path: str,
        record: Record,
        check: Callable[[str], object] | None,
    ) -> int:
        properties = {prop.key: prop.value for prop in model.metadata_props}
        onnx.helper.set_model_props(model, {**properties, KEY: record.to_json()})
        with replacing_by_name(path) as part:
            onnx.save(model, part)
            onnx.checker.check_model(part)
            if check is not None:
                check(part)
        return os.path.getsize(path)

    def size(self) -> int:
        return os.path.getsize(self.path)


def _grouped(node: onnx.NodeProto) -> bool:
    """Whether it is a convolution in groups, which stay in float32."""
    return any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
