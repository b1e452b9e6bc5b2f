"""Builds models to count, on fake tensors: a bare backbone, or the model of a config."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.variants import Arch, VoloArch

from ..archs import build_backbone, describe_arch
from ..export.parts import stages

# Height and width in pixels, as published tables have them.
DETECTION, SEGMENTATION, CLASSIFICATION = (800, 1280), (512, 2048), (224, 224)
# As in MMDetection: the box heads process all proposals, the mask heads the final detections.
PROPOSALS, DETECTIONS = 1000, 100


@dataclass
class Subject:
    """A model to count: ``module`` on fake tensors.

    ``run`` passes one image [1, 3, H, W] through it, as in testing. ``size`` is the default (H, W)
    in pixels.
    """

    name: str
    module: nn.Module
    run: Callable[[Tensor], Any]
    size: tuple[int, int]


def bare_backbone(arch: Arch | VoloArch) -> Subject:
    """Builds a backbone with all outputs and their norms, as detectors and segmentors use it."""
    with FakeTensorMode():
        module = build_backbone(arch).eval()
    return Subject(describe_arch(arch), module, module, CLASSIFICATION)


def from_config(path: str) -> Subject:
    """Builds the model of a config of Detectron2 (.yaml) or OpenMMLab (.py).

    Raises UsageError if the file does not exist or is not such a config.
    """
    if not os.path.isfile(path):
        raise UsageError(f"the config file {path} does not exist")
    if path.endswith((".yaml", ".yml")):
        return _from_detectron2(path)
    if path.endswith(".py"):
        return _from_openmmlab(path)
    raise UsageError(f"a config is a .yaml file of Detectron2 or a .py file of OpenMMLab: {path}")


def _from_detectron2(path: str) -> Subject:
    from detectron2.modeling import META_ARCH_REGISTRY

    import elsa_d2

    cfg = elsa_d2.load_config(path, ["MODEL.DEVICE", "cpu"])
    name = cfg.MODEL.META_ARCHITECTURE
    try:
        with FakeTensorMode():
            module: Any = META_ARCH_REGISTRY.get(name)(cfg).eval()
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the config {path} cannot be used: {one_line(error)}") from error
    if hasattr(module, "sem_seg_head") and hasattr(module.sem_seg_head, "logits"):
        return Subject(
            path, module, lambda x: module.sem_seg_head.logits(module.backbone(x)), SEGMENTATION
        )
    if not hasattr(module, "roi_heads") or not hasattr(module, "proposal_generator"):
        raise UsageError(f"{path}: MODEL.META_ARCHITECTURE {name} cannot be counted")

    def run(image: Tensor) -> None:
        rpn, heads = module.proposal_generator, module.roi_heads
        features = module.backbone(image)
        rpn.rpn_head([features[level] for level in rpn.in_features])
        channels = features[heads.box_in_features[0]].shape[1]
        side = heads.box_pooler.output_size
        pairs = zip(stages(heads.box_head), stages(heads.box_predictor), strict=True)
        for head, predictor in pairs:
            predictor(head(image.new_empty(PROPOSALS, channels, *side)))
        if heads.mask_on:
            side = heads.mask_pooler.output_size
            for head in stages(heads.mask_head):
                head.layers(image.new_empty(DETECTIONS, channels, *side))
        if heads.keypoint_on:
            side = heads.keypoint_pooler.output_size
            heads.keypoint_head.layers(image.new_empty(DETECTIONS, channels, *side))

    return Subject(path, module, run, DETECTION)


def _from_openmmlab(path: str) -> Subject:
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    try:
        cfg = Config.fromfile(path)
        scope = cfg.default_scope
        if scope == "mmpretrain":
            cfg.model.train_cfg = None  # builds a batch augmentation, and warns
        with DefaultScope.overwrite_default_scope(scope), FakeTensorMode():
            importlib.import_module(f"{scope}.utils").register_all_modules(init_default_scope=False)
            module = MODELS.build(cfg.model).eval()
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a config is a program, and can fail in any way
        raise UsageError(f"the config {path} cannot be used: {one_line(error)}") from error
    return openmmlab_subject(path, module, scope)


def openmmlab_subject(name: str, module: Any, scope: str) -> Subject:
    """Wraps a model of the toolbox ``scope``: "mmdet", "mmseg" or "mmpretrain"."""
    if hasattr(module, "decode_head"):
        head = module.decode_head
        more = [None] if hasattr(head, "pixel_decoder") else []  # Mask2Former's unused samples
        size, run = SEGMENTATION, lambda x: head(module.extract_feat(x), *more)
    elif scope == "mmpretrain":
        size, run = CLASSIFICATION, module
    elif hasattr(module, "roi_head"):
        size, run = DETECTION, lambda x: _run_two_stages(module, x)
    else:
        size, run = DETECTION, lambda x: module(x, [_sample(x)])
    return Subject(name, module, run, size)


def _sample(image: Tensor) -> Any:
    """MMDetection's record of an image [1, 3, H, W] without padding."""
    from mmdet.structures import DetDataSample

    size = tuple(image.shape[-2:])
    return DetDataSample(metainfo=dict(batch_input_shape=size, img_shape=size))


def _run_two_stages(model: Any, image: Tensor) -> None:
    head: Any = model.roi_head
    features = model.extract_feat(image)
    model.rpn_head(features)
    parts = [(head.bbox_head, head.bbox_roi_extractor, PROPOSALS)]
    if head.with_mask:
        parts.append((head.mask_head, head.mask_roi_extractor, DETECTIONS))
    for part, extractor, samples in parts:
        for stage, stage_extractor in zip(stages(part), stages(extractor), strict=True):
            side = stage_extractor.roi_layers[0].output_size
            stage(image.new_empty(samples, stage_extractor.out_channels, *side))
