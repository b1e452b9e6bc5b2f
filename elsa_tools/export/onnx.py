"""ONNX files of backbones, segmentors and detectors.

A file serves images of any number and size. It computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from elsa_core import ELSASwin, ELSAVolo
from elsa_core.runtime.errors import UsageError, one_line

from . import graph as onnx_graph
from . import onnx_ops, volo_graph
from .models import Exportable, family_of, map_strides
from .quiet import quiet
from .record import KEY, Record

OPSET = 20
# Numbers of a constant from which float16 pays for its cast.
_LEAST_HALF = 1024
# The backbones that are being exported, by the number in the operator that stands for them.
_backbones: dict[int, ELSASwin | ELSAVolo] = {}

_library = torch.library.Library("elsa_export", "DEF")
_library.define("backbone(Tensor image, int number) -> Tensor[]")


@torch.library.register_fake("elsa_export::backbone")
def _backbone_fake(image: Tensor, number: int) -> list[Tensor]:
    module = _backbones[number]
    batch, _, *size = image.shape
    whole, strides = map_strides(module)

    def sides(stride: int) -> list[int]:
        # Without negative numbers, which ONNX's division would round the other way.
        if stride % whole == 0:
            return [(side + stride - 1) // stride for side in size]
        return [(side + whole - 1) // whole * (whole // stride) for side in size]

    return [
        image.new_empty(batch, module.num_features[index], *sides(strides[index]))
        for index in module.out_indices
    ]


def _graph(image: Any, number: int) -> list[Any]:
    module = _backbones[number]
    graph = volo_graph if isinstance(module, ELSAVolo) else onnx_graph
    return graph.backbone(module, image)


# What PyTorch's exporter does not know, or only for known sizes.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.elsa_export.backbone.default: _graph,
    torch.ops.aten.adaptive_avg_pool2d.default: onnx_graph.adaptive_average_pool,
    **onnx_ops.TRANSLATIONS,
}


def write_onnx(module: Exportable, path: str, record: Record) -> None:
    """Writes a file that onnx has checked; the caller replaces what was there.

    Where the record says float16, the weights that float16 holds exactly are stored in it.

    Raises UsageError where PyTorch cannot export the model.
    """
    program = _translate(module)
    if record.precision == "float16":
        _store_half(program.model)
    program.model.metadata_props[KEY] = record.to_json()
    program.save(path)
    onnx.checker.check_model(path, full_check=True)


def _translate(module: Exportable) -> Any:
    try:
        with _opaque(module.backbone), quiet("torch.onnx"), torch.no_grad():
            program: Any = torch.onnx.export(
                module,
                module.example(),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=list(module.inputs),
                output_names=list(module.names),
                dynamic_shapes=module.dynamic_shapes(),
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UsageError(f"PyTorch cannot export the model: {one_line(error)[:300]}") from error
    # Without the names of types that PyTorch leaves to the executor, which warns of them.
    optimizer.fold_constants(program.model, onnx_shape_inference=False)
    for change in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
    ):
        change(program.model)
    _name_sizes(program.model, module)
    return program


def _store_half(model: Any) -> None:
    """Stores large constants in float16, where it holds them exactly, with a cast back."""
    for value in list(model.graph.initializers.values()):
        if value.dtype != onnx_ir.DataType.FLOAT or value.const_value.size < _LEAST_HALF:
            continue
        numbers = value.const_value.numpy()
        half = numbers.astype(np.float16)
        if not np.array_equal(half, numbers):
            continue
        stored = onnx_ir.Value(
            name=f"{value.name}_float16", const_value=onnx_ir.tensor(half, name=value.name)
        )
        cast = onnx_ir.node("Cast", [stored], {"to": onnx_ir.DataType.FLOAT})
        value.replace_all_uses_with(cast.outputs[0])
        del model.graph.initializers[value.name]
        model.graph.initializers[stored.name] = stored
        model.graph.insert_before(model.graph[0], cast)


# Readable names instead of the tracer's for the sizes of inputs and outputs.
_SHAPES: dict[str, list[str | int]] = {
    "image": ["batch", 3, "height", "width"],
    "size": ["batch", 2],
    "logits": ["batch", -1, "height", "width"],
    "boxes": ["detections", 4],
    "scores": ["detections"],
    "labels": ["detections"],
    "images": ["detections"],
    "masks": ["detections", -1, -1],
}


def _name_sizes(model: Any, module: Exportable) -> None:
    values = zip(
        (*model.graph.inputs, *model.graph.outputs), (*module.inputs, *module.names), strict=True
    )
    for value, name in values:
        shape = _SHAPES.get(name) or ["batch", -1, *_sides(module, name)]
        known = zip(shape, value.shape, strict=True)
        value.shape = onnx_ir.Shape([old if side == -1 else side for side, old in known])


def _sides(module: Exportable, name: str) -> list[str]:
    """The height and width of a backbone's map, in words."""
    index = module.backbone.out_indices[module.names.index(name)]
    whole, strides = map_strides(module.backbone)
    stride = strides[index]
    times = f"*{whole // stride}" if stride < whole else ""
    return [f"ceil({side}/{max(whole, stride)}){times}" for side in ("height", "width")]


@contextmanager
def _opaque(backbone: ELSASwin | ELSAVolo) -> Iterator[None]:
    """Within it, a backbone's forward is one operator that no tracer looks into."""
    family: Any = family_of(backbone)
    number, forward = id(backbone), family.forward

    def stand_in(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.elsa_export.backbone(x, number))

    _backbones[number] = backbone
    family.forward = stand_in
    try:
        yield
    finally:
        family.forward = forward
        del _backbones[number]
