"""Parameters and operations of models, counted on fake tensors: without memory or arithmetic.

An operation is a multiply-add in a convolution, a linear layer or a matrix product, as papers on
backbones count "FLOPs"; normalisation, activations and resizing are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmdet.registry
import mmseg.registry
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import elsa_core
import elsa_d2
import elsa_mm  # noqa: F401  registers the backbone

DETECTION_SIZE = (800, 1280)  # height and width
SEGMENTATION_SIZE = (512, 2048)
CLASSIFICATION_SIZE = (224, 224)
CLASSES = 1000
# As MMDetection counted: all proposals through the box heads, those shown through the mask heads.
PROPOSALS, DETECTIONS = 1000, 100
MODELS = {"mmdet": mmdet.registry.MODELS, "mmseg": mmseg.registry.MODELS}


def openmmlab_model(config: str | Path) -> nn.Module:
    """The model of a config of MMDetection or MMSegmentation, on fake tensors, in eval mode."""
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), FakeTensorMode():
        return MODELS[cfg.default_scope].build(cfg.model).eval()


def detectron2_model(config: str | Path) -> nn.Module:
    """The model of a config of Detectron2, without memory, in eval mode."""
    cfg = elsa_d2.load_config(str(config), ["MODEL.DEVICE", "cpu"])
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).eval()


def backbone_model(arch: str) -> nn.Module:
    """The backbone with what classification needs of it: the last stage's map."""
    with FakeTensorMode():
        return elsa_core.ELSASwin(arch, out_indices=(3,)).eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def detector_operations(model: nn.Module, size: tuple[int, int] = DETECTION_SIZE) -> int:
    """Of one image of ``size`` through a two-stage detector of MMDetection with masks."""
    head = model.roi_head

    def run(image: torch.Tensor) -> None:
        model.rpn_head(model.extract_feat(image))
        for part, extractor, samples in (
            (head.bbox_head, head.bbox_roi_extractor, PROPOSALS),
            (head.mask_head, head.mask_roi_extractor, DETECTIONS),
        ):
            stages = zip(*map(_stages, (part, extractor)), strict=True)
            for stage, stage_extractor in stages:
                side = stage_extractor.roi_layers[0].output_size
                stage(image.new_empty(samples, stage_extractor.out_channels, *side))

    return _operations(run, size)


def segmentor_operations(model: nn.Module, size: tuple[int, int] = SEGMENTATION_SIZE) -> int:
    """Of one image of ``size`` through a segmentor of MMSegmentation, as it is tested."""
    return _operations(lambda image: model.decode_head(model.extract_feat(image)), size)


def classifier_operations(model: nn.Module, size: tuple[int, int] = CLASSIFICATION_SIZE) -> int:
    """Of one image of ``size`` through a backbone and a linear classifier."""
    return _operations(model, size) + model.num_features[-1] * CLASSES


def classifier_parameters(model: nn.Module) -> int:
    """Of a backbone whose last map goes to a linear classifier."""
    return parameters(model) + (model.num_features[-1] + 1) * CLASSES


def _stages(part: nn.Module) -> list[nn.Module]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]


def _attention_operations(
    value: torch.Size,
    logits: torch.Size,
    ghost_add: torch.Size | None,
    ghost_mul: torch.Size | None,
    kernel_size: int,
    dilation: int,
    **_: Any,
) -> int:
    """Twice the multiply-adds: one a tap for the value, one for the ghost filters."""
    taps = value.numel() * kernel_size**2
    return 2 * taps * (1 + (ghost_add is not None or ghost_mul is not None))


_FORMULAS = {torch.ops.elsa.attention: _attention_operations}


class _RefuseUnknown(TorchDispatchMode):
    """No operator of ours is left out unnoticed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "elsa" and func.overloadpacket not in _FORMULAS:
            raise NotImplementedError(f"zoo/counts.py has no formula for {func}")
        return func(*args, **(kwargs or {}))


def _operations(run: Callable[[torch.Tensor], Any], size: tuple[int, int]) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    # Of models on real tensors too, so that stock models can be counted for comparison.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), counter, _RefuseUnknown():
        run(torch.empty(1, 3, *size))
    return counter.get_total_flops() // 2
