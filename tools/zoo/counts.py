"""Parameters and operations of models, counted on fake tensors: without memory or arithmetic.

What counts as an operation is in `elsa_core.flops`.
"""

from __future__ import annotations

from pathlib import Path

import mmdet.registry
import mmpretrain.registry
import mmseg.registry
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import elsa_d2
import elsa_mm  # noqa: F401  registers the backbone
from elsa_core.flops import count_flops

# Height and width of an image as it is tested, of each data set.
SIZES = {
    "COCO": (800, 1280),
    "ADE20K": (512, 2048),
    "Cityscapes": (1024, 2048),
    "ImageNet-1K": (224, 224),
}
# As MMDetection counted: all proposals through the box heads, those shown through the mask heads.
PROPOSALS, DETECTIONS = 1000, 100
MODELS = {
    "mmdet": mmdet.registry.MODELS,
    "mmpretrain": mmpretrain.registry.MODELS,
    "mmseg": mmseg.registry.MODELS,
}


def openmmlab_model(config: str | Path) -> nn.Module:
    """The model of a config of OpenMMLab, on fake tensors, in eval mode."""
    cfg = Config.fromfile(config)
    if cfg.default_scope == "mmpretrain":
        cfg.model.train_cfg = None  # mixes images, and says so
    with DefaultScope.overwrite_default_scope(cfg.default_scope), FakeTensorMode():
        return MODELS[cfg.default_scope].build(cfg.model).eval()


def detectron2_model(config: str | Path) -> nn.Module:
    """The model of a config of Detectron2, without memory, in eval mode."""
    cfg = elsa_d2.load_config(str(config), ["MODEL.DEVICE", "cpu"])
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def detector_operations(model: nn.Module, size: tuple[int, int]) -> int:
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

    return count_flops(run, size)


def segmentor_operations(model: nn.Module, size: tuple[int, int]) -> int:
    """Of one image of ``size`` through a segmentor of MMSegmentation, as it is tested."""
    return count_flops(lambda image: model.decode_head(model.extract_feat(image)), size)


def classifier_operations(model: nn.Module, size: tuple[int, int]) -> int:
    """Of one image of ``size`` through a classifier of MMPretrain."""
    return count_flops(model, size)


def _stages(part: nn.Module) -> list[nn.Module]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]


OPERATIONS = {
    "mmdet": detector_operations,
    "mmpretrain": classifier_operations,
    "mmseg": segmentor_operations,
}
