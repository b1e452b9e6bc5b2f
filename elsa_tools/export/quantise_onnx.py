"""int8 ONNX files, by onnxruntime: with QuantizeLinear and DequantizeLinear, standard operators."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType
from onnxruntime.quantization.calibrate import MinMaxCalibrater, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

from elsa_core.runtime.files import replacing_by_name

from .calibration import Arrays, Images, Run
from .quantiser import Quantiser, part_of, without_output
from .quiet import quiet
from .record import KEY, Record, onnx_record

# Operators with weights; their second input.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class _Reader(CalibrationDataReader):
    def __init__(self, images: Images, bar: Any) -> None:
        self.images, self.bar = iter(images), bar

    def get_next(self) -> Arrays | None:
        self.bar.update()
        return next(self.images, None)


class _Calibrater(MinMaxCalibrater):
    """Of the inputs and outputs of some nodes alone.

    Those of all nodes, which onnxruntime takes otherwise, are held at the same time: more than
    20 GB for an image of 800x1333.
    """

    def __init__(self, path: Path, nodes: Collection[str]) -> None:
        super().__init__(path, augmented_model_path=str(path.with_name("augmented.onnx")))
        self.nodes = nodes

    def select_tensors_to_calibrate(self, model: onnx.ModelProto) -> tuple[set[str], Any]:
        tensors, infos = super().select_tensors_to_calibrate(model)
        nodes = [node for node in model.graph.node if node.name in self.nodes]
        return tensors & {name for node in nodes for name in (*node.input, *node.output)}, infos


class OnnxRuntime(Quantiser):
    def __init__(self, path: str) -> None:
        self.path, self.record = path, onnx_record(path)
        self._ranges: TensorsData | None = None
        model = onnx.load(path)
        weights = {tensor.name for tensor in model.graph.initializer}
        self.parts: dict[str, list[str]] = {}
        for node in model.graph.node:
            if node.op_type in WEIGHTED and node.input[1] in weights and not _grouped(node):
                self.parts.setdefault(part_of(node.input[1]), []).append(node.name)

    def quantised(self, names: Collection[str], images: Images, bar: Any) -> onnx.ModelProto:
        with quiet("root"), without_output(), tempfile.TemporaryDirectory() as folder:
            # onnxruntime writes beside the model.
            path = Path(folder, "model.onnx")
            path.symlink_to(os.path.abspath(self.path))
            if self._ranges is None:
                self._ranges = self._calibrated(path, images, bar)
            else:
                bar.update(len(images))
            quantizer = QDQQuantizer(
                load_model_with_shape_infer(path),
                per_channel=True,
                reduce_range=False,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=self._ranges,
                nodes_to_quantize=list(names),
                nodes_to_exclude=[],
                op_types_to_quantize=list(WEIGHTED),
                extra_options={},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        return quantizer.model.model

    def _calibrated(self, path: Path, images: Images, bar: Any) -> TensorsData:
        """Ranges of what the nodes of all parts take and give."""
        nodes = {name for part in self.parts.values() for name in part}
        calibrater = _Calibrater(path, nodes)
        calibrater.augment_graph()
        calibrater.create_inference_session()
        calibrater.collect_data(_Reader(images, bar))
        return calibrater.compute_data()

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
