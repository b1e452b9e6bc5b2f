"""int8 models of OpenVINO, by NNCF."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

import openvino as ov

from elsa_core.runtime.packages import need

from .calibration import Arrays, Images, Run
from .openvino import compile_model, read_exported, weights_path, write_openvino
from .quantiser import Quantiser, part_of, without_output
from .record import Record

# Operators with weights. Convolutions in groups stay in float32: NNCF 3.4 gives the channels of
# their input the wrong axis where it is transposed. They are ELSA's and take little time.
WEIGHTED = ("Convolution", "ConvolutionBackpropData", "MatMul")
# Other operators that NNCF would quantise. It takes no types that a model does not have otherwise.
OTHERS = (
    *("Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Power", "FloorMod"),
    *("Less", "LessEqual", "Greater", "GreaterEqual", "Equal", "NotEqual"),
    *("LogicalAnd", "LogicalOr", "LogicalXor", "LogicalNot", "SquaredDifference"),
    *("AvgPool", "ReduceMean", "MVN", "NormalizeL2", "Interpolate"),
    *("BatchNormInference", "GroupConvolution", "GroupNormalization"),
)


class OpenVINO(Quantiser):
    def __init__(self, path: str) -> None:
        # Importing it starts no telemetry then.
        os.environ.setdefault("NNCF_CI", "1")
        self.nncf: Any = need("nncf", "int8 of OpenVINO")
        self.path = path
        self.model, self.record = read_exported(path)
        self.parts: dict[str, list[str]] = {}
        self.rest = []
        for operator in self.model.get_ordered_ops():
            if operator.get_type_name() in WEIGHTED:
                name, weight = operator.get_friendly_name(), operator.input_value(1).get_node()
                if weight.get_type_name() == "Constant":
                    part = part_of(weight.get_friendly_name())
                    self.parts.setdefault(part, []).append(name)
                else:
                    self.rest.append(name)

    def quantised(self, names: Collection[str], images: Images, bar: Any) -> ov.Model:
        nncf = self.nncf
        weighted = [name for part in self.parts.values() for name in part]
        ignored = [*self.rest, *(name for name in weighted if name not in names)]

        class Counted:
            def __len__(self) -> int:
                return len(images)

            def __iter__(self) -> Iterator[Arrays]:
                for one in images:
                    yield one
                    bar.update()

        nncf.set_log_level(logging.ERROR)
        with without_output():
            # Symmetric: OpenVINO 2026.4 cannot compile convolutions after asymmetric activations.
            return nncf.quantize(
                self.model.clone(),
                nncf.Dataset(Counted()),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                subset_size=len(images),
                ignored_scope=nncf.IgnoredScope(names=ignored, types=[*OTHERS], validate=False),
            )

    def runner(self, model: ov.Model | None, threads: int | None) -> Run:
        compiled = compile_model(self.model if model is None else model, threads)

        def run(inputs: Arrays) -> Arrays:
            return {output.any_name: value for output, value in compiled(inputs).items()}

        return run

    def write(
        self,
        model: ov.Model,
        path: str,
        record: Record,
        check: Callable[[str], object] | None,
    ) -> int:
        write_openvino(model, path, record, check=check)
        return sum(os.path.getsize(file) for file in (path, weights_path(path)))

    def size(self) -> int:
        files = [self.path, *([weights_path(self.path)] if self.path.endswith(".xml") else [])]
        return sum(map(os.path.getsize, files))
