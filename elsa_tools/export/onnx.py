"""ONNX files of ELSA-Swin and of UPerNet on it, compared with PyTorch before they are written.

A file serves images of any number and size. It computes in float32.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir.passes.common as passes
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elsa_core import ELSASwin
from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.runtime.files import replacing_by_name
from elsa_tools.predict.inferencer import Inferencer

from . import graph as onnx_graph
from .record import KEY, Record

OPSET = 20
TOLERANCE = 1e-4
SIZES = ((64, 96), (97, 71), (130, 161))
# The backbones that are being exported, by the number in the operator that stands for them.
_backbones: dict[int, ELSASwin] = {}

_library = torch.library.Library("elsa_export", "DEF")
_library.define("backbone(Tensor image, int number) -> Tensor[]")


@torch.library.register_fake("elsa_export::backbone")
def _backbone_fake(image: Tensor, number: int) -> list[Tensor]:
    module = _backbones[number]
    batch, _, *size = image.shape

    def sides(stride: int) -> list[int]:
        # Without negative numbers, which ONNX's division would round the other way.
        return [(side + stride - 1) // stride for side in size]

    return [
        image.new_empty(batch, module.num_features[stage], *sides(2 ** (stage + 2)))
        for stage in module.out_indices
    ]


# What PyTorch's exporter does not know, or only for known sizes.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.elsa_export.backbone.default: lambda image, number: onnx_graph.backbone(
        _backbones[number], image
    ),
    torch.ops.aten.adaptive_avg_pool2d.default: onnx_graph.adaptive_average_pool,
}


class Backbone(nn.Module):
    """Images [B, 3, H, W] -> a map [B, C_i, H_i, W_i] of each output of the backbone.

    Args:
        normalisation: mean and deviation of images with values in 0..255, RGB; None for images
            that are normalised already.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: ELSASwin, normalisation: tuple[Sequence[float], Sequence[float]] | None
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.normalised = normalisation is None
        mean, std = normalisation or ([0.0] * 3, [1.0] * 3)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.names = [f"res{stage + 2}" for stage in backbone.out_indices]

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        image = image if self.normalised else (image - self.mean) / self.std
        return ELSASwin.forward(self.backbone, image)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.features(image)


class Segmentor(Backbone):
    """Images [B, 3, H, W] -> logits [B, K, H, W], for Detectron2's and MMSegmentation's UPerNet."""

    def __init__(self, inferencer: Inferencer) -> None:
        model: Any = inferencer.model
        super().__init__(model.backbone, inferencer.normalisation())
        self.names = ["logits"]
        self.detectron2 = inferencer.framework == "detectron2"
        self.head: Any = model.sem_seg_head if self.detectron2 else model.decode_head

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.features(image)
        if self.detectron2:
            logits = self.head.logits(dict(zip(self.backbone._out_features, features, strict=True)))
        else:
            logits = self.head(features)
        size = image.shape[-2:]
        return (F.interpolate(logits, size, mode="bilinear", align_corners=False),)


@dataclass(frozen=True)
class Difference:
    """The largest difference between PyTorch and onnxruntime on random images of one size.

    ``value`` is absolute for a backbone's maps, which layer normalisation keeps near 1, and divided
    by the largest value for logits.
    """

    shape: tuple[int, ...]
    value: float


def wrap(inferencer: Inferencer, part: str) -> Backbone:
    """What to export of a model: "backbone", "model", or "auto": the model where it is a UPerNet.

    Raises UsageError for a backbone other than ELSA-Swin, and for a model other than UPerNet.
    """
    model = inferencer.model
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    if not isinstance(backbone, ELSASwin):
        raise UsageError(f"the backbone must be an ELSA-Swin, got {type(backbone).__name__}")
    if part == "backbone" or (part == "auto" and inferencer.task != "segmentation"):
        return Backbone(backbone, inferencer.normalisation())
    head = getattr(model, "sem_seg_head", getattr(model, "decode_head", None))
    if type(head).__name__ not in ("UPerNetHead", "UPerHead"):
        raise UsageError(
            f"of whole models UPerNet alone is exported, got {type(model).__name__}: "
            "--part backbone exports its backbone"
        )
    return Segmentor(inferencer)


def export(
    module: Backbone,
    path: str,
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    record: Record | None = None,
) -> list[Difference]:
    """Writes ``path``, checked by onnx and compared with PyTorch over ``sizes`` (height, width).

    Args:
        record: of the model, for the file's metadata.

    Raises:
        UsageError: it cannot be exported or written, or differs by more than 1e-4; then ``path``
            is as it was.
    """
    module = module.cpu().float().eval()
    program = _translate(module)
    if record is not None:
        program.model.metadata_props[KEY] = record.to_json()
    with replacing_by_name(path) as part:
        program.save(part)
        onnx.checker.check_model(part, full_check=True)
        found = compare(module, part, sizes)
        worst = max(found, key=lambda difference: difference.value)
        if not worst.value <= TOLERANCE:
            raise UsageError(
                f"onnxruntime and PyTorch must agree to {TOLERANCE:g}, they differ by "
                f"{worst.value:.1e} on images of {worst.shape}: {path} was not written"
            )
    return found


def compare(module: Backbone, path: str, sizes: Sequence[tuple[int, int]]) -> list[Difference]:
    """The differences on random images, the first of them two at a time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    found = []
    for index, size in enumerate(sizes):
        image = torch.randn((2 if index == 0 else 1, 3, *size), generator=generator)
        image = image if module.normalised else (image * 58 + 116).clamp(0, 255)
        with torch.no_grad():
            wanted = [output.numpy() for output in module(image)]
        got = session.run(None, {"image": image.numpy()})
        scale = np.abs(wanted[0]).max() if isinstance(module, Segmentor) else 1.0
        worst = max(float(np.abs(a - b).max()) for a, b in zip(got, wanted, strict=True))
        found.append(Difference(tuple(image.shape), worst / max(float(scale), 1e-12)))
    return found


def _translate(module: Backbone) -> Any:
    # Two images with odd sides, so that nothing is taken for a constant.
    example = torch.zeros(2, 3, 97, 131)
    dynamic = torch.export.Dim.DYNAMIC
    try:
        with _opaque(module.backbone), _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=module.names,
                dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UsageError(f"PyTorch cannot export the model: {one_line(error)[:300]}") from error
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


def _name_sizes(model: Any, module: Backbone) -> None:
    """Readable names instead of the tracer's for the sizes of inputs and outputs."""
    import onnx_ir

    model.graph.inputs[0].shape = onnx_ir.Shape(["batch", 3, "height", "width"])
    for output, name in zip(model.graph.outputs, module.names, strict=True):
        channels = output.shape[1]
        sides = ["height", "width"]
        if name.startswith("res"):
            sides = [f"ceil({side}/{2 ** int(name[3:])})" for side in sides]
        output.shape = onnx_ir.Shape(["batch", channels, *sides])


@contextmanager
def _opaque(backbone: ELSASwin) -> Iterator[None]:
    """Within it, a backbone's forward is one operator that no tracer looks into."""
    number, forward = id(backbone), ELSASwin.forward

    def stand_in(self: ELSASwin, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.elsa_export.backbone(x, number))

    _backbones[number] = backbone
    ELSASwin.forward = stand_in  # type: ignore[method-assign]
    try:
        yield
    finally:
        ELSASwin.forward = forward  # type: ignore[method-assign]
        del _backbones[number]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on torchvision and on names that it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
