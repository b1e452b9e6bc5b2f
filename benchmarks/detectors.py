"""Mask R-CNN around ELSA-Swin and stock Swin, of which both do the same work behind the backbone.

Untrained heads find random numbers of boxes. At inference the last layers of the RPN and of the box
head therefore compute as usual and give values that depend on the shape alone: all contenders have
the same proposals and detections. In training, all get the same proposals.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from elsa_core import VARIANTS

from .clock import Clock, Run
from .measure import Parts

CONFIGS = Path(__file__).resolve().parents[1] / "configs/mmdet/elsa_swin"
CONFIG = "mask-rcnn_elsa-swin-{}-p4-w7_fpn_amp-ms-crop-1x_coco.py"
CONTENDERS = ("elsa", "stock swin")
"""Backbones under the heads of this project."""
OF_PARTS = (*CONTENDERS, "elsa, stock heads", "stock swin, stock heads")
"""The last is the model as MMDetection has it."""
PROPOSALS, DETECTIONS = 1000, 100
"""Of each image, by the published configs."""

TRIFLE = 2**-60
"""What is multiplied by it and added to a result leaves the result as it is."""

Shape = tuple[int, int, int, int]  # of the images: batch, 3, height, width


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Computes in ``dtype`` with float32 parameters, as in training."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def stock_options(name: str) -> dict[str, object]:
    """Returns the arguments of MMDetection's Swin of the same size as ELSA-Swin ``name``."""
    arch = VARIANTS[name]
    return {
        "embed_dims": arch.embed_dim,
        "depths": arch.depths,
        "num_heads": arch.num_heads,
        "window_size": arch.window_size,
        "drop_path_rate": 0.0,
    }


def detectors(name: str, size: tuple[int, int]) -> dict[str, nn.Module]:
    return {which: detector(name, which) for which in CONTENDERS}


def detector(name: str, which: str) -> nn.Module:
    """Builds the contender ``which`` of `OF_PARTS`, untrained."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules(init_default_scope=True)
    config = Config.fromfile(CONFIGS / CONFIG.format(name[0]))
    backbone, _, heads = which.partition(", ")
    if heads:
        roi = config.model.roi_head
        config.model.rpn_head.type = "RPNHead"
        roi.bbox_roi_extractor.type = roi.mask_roi_extractor.type = "SingleRoIExtractor"
        roi.bbox_head.type, roi.mask_head.type = "ConvFCBBoxHead", "FCNMaskHead"
    if backbone == "stock swin":
        config.model.backbone = {"type": "SwinTransformer", **stock_options(name)}
    else:
        config.model.backbone.drop_path_rate = 0.0
    config.model.backbone.pop("init_cfg", None)
    torch.manual_seed(0)
    return MODELS.build(config.model)


class SameOutputs(nn.Module):
    """Computes a layer and gives ``values(shape)`` instead, with the layer's device and type.

    The layer's output is added, too small to matter: no graph optimiser may leave the layer out.
    """

    def __init__(self, layer: nn.Module, values: Callable[[Sequence[int]], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        name = "_".join(map(str, ("of", *out.shape)))
        if not hasattr(self, name):
            self.register_buffer(name, self.values(tuple(out.shape)).to(out), persistent=False)
        return torch.add(getattr(self, name), out, alpha=TRIFLE)


def _random(shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def deltas(shape: Sequence[int]) -> Tensor:
    return 0.2 * _random(shape)


def objectness(shape: Sequence[int]) -> Tensor:
    """Returns logits [B, A, H, W] by which all levels of a pyramid have as many of the best."""
    anchors = math.prod(shape[1:])
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(anchors))
    return -uniform.clamp(min=1e-9).log() - math.log(anchors)


def classes(shape: Sequence[int]) -> Tensor:
    """Returns logits [R, classes + 1] of which most proposals are background, the last class."""
    logits = 2 * _random(shape)
    logits[:, -1] += 10
    return logits


def with_same_outputs(model: nn.Module) -> nn.Module:
    """Returns a copy of a Mask R-CNN of MMDetection whose heads find the same as any other's."""
    model = copy.deepcopy(model).eval()
    rpn, box = model.rpn_head, model.roi_head.bbox_head
    rpn.rpn_cls = SameOutputs(rpn.rpn_cls, objectness)
    rpn.rpn_reg = SameOutputs(rpn.rpn_reg, deltas)
    box.fc_cls = SameOutputs(box.fc_cls, classes)
    box.fc_reg = SameOutputs(box.fc_reg, deltas)
    return model


def inference(model: nn.Module, shape: Shape, clock: Clock, dtype: torch.dtype) -> Run:
    model = with_same_outputs(model)
    image = torch.randn(shape, device=clock.device)

    def run() -> list[Any]:
        with torch.no_grad(), autocast(clock.device, dtype):
            samples = model(image, _samples(shape, clock.device), mode="predict")
        for found in (sample.pred_instances for sample in samples):
            assert len(found) == len(found.masks) == DETECTIONS, f"{len(found)} detections"
        return samples

    return run


def inference_parts(model: nn.Module, shape: Shape, clock: Clock, dtype: torch.dtype) -> Parts:
    """Does what `inference` does, part by part."""
    from mmdet.structures.bbox import bbox2roi

    model = with_same_outputs(model)
    image = torch.randn(shape, device=clock.device)
    rpn, roi = model.rpn_head, model.roi_head

    def run() -> Iterator[str]:
        with torch.no_grad(), autocast(clock.device, dtype):
            samples = _samples(shape, clock.device)
            infos = [sample.metainfo for sample in samples]
            maps = model.backbone(image)
            yield "backbone"
            maps = model.neck(maps)
            yield "FPN"
            proposals = rpn.predict(maps, samples, rescale=False)
            yield "RPN"
            found = roi.predict_bbox(maps, infos, proposals, roi.test_cfg)
            yield "box head"
            masks = roi._mask_forward(maps, bbox2roi([one.bboxes for one in found]))
            masks = masks["mask_preds"].split([len(one) for one in found])
            yield "mask head"
            roi.mask_head.predict_by_feat(masks, found, infos, roi.test_cfg, rescale=True)
            yield "pasting"
        assert all(len(one.masks) == DETECTIONS for one in found)

    return run


def check_equal_work(models: Mapping[str, nn.Module], shape: Shape, device: torch.device) -> None:
    """Checks that all models have the same proposals and detections, and as many masks.

    Raises:
        RuntimeError: they do unequal work.
    """
    from mmdet.structures import DetDataSample

    def work(model: nn.Module) -> list[list[Tensor]]:
        model = with_same_outputs(model)
        samples: list[DetDataSample] = _samples(shape, device)
        with torch.no_grad():
            maps = model.extract_feat(torch.randn(shape, device=device))
            proposals = model.rpn_head.predict(maps, samples, rescale=False)
            boxes = [one.bboxes.clone() for one in proposals]
            found = model.roi_head.predict(maps, proposals, samples, rescale=True)
        return [
            [box, one.bboxes, one.scores, one.labels, torch.tensor(one.masks.shape)]
            for box, one in zip(boxes, found, strict=True)
        ]

    works = {which: work(model) for which, model in models.items()}
    first, *others = works
    height, width = shape[2:]
    for boxes, *_, masks in works[first]:
        if len(boxes) != PROPOSALS or masks.tolist() != [DETECTIONS, height, width]:
            raise RuntimeError(
                f"an image must have {PROPOSALS} proposals and {DETECTIONS} masks, "
                f"got {len(boxes)} and {masks.tolist()}"
            )
    for other in others:
        for ours, theirs in zip(works[first], works[other], strict=True):
            if not all(map(torch.equal, ours, theirs)):
                raise RuntimeError(f"the heads of {first} and {other} must do equal work")


def _boxes(size: tuple[int, int]) -> Tensor:
    """Returns the boxes of an image's 8 objects, half as wide and high as it: [8, 4], in pixels."""
    height, width = size
    corner = torch.linspace(0, 0.5, 8)[:, None]
    boxes = torch.cat([corner * width, corner * height], 1)
    return torch.cat([boxes, boxes + torch.tensor([width / 2, height / 2])], 1)


def _proposals(size: tuple[int, int], device: torch.device) -> object:
    """Returns 1000 proposals: a quarter near the objects (more than are sampled), the rest far."""
    from mmengine.structures import InstanceData

    height, width = size
    generator = torch.Generator().manual_seed(0)
    near = _boxes(size).repeat(32, 1)[:250]
    near = near + (torch.rand(near.shape, generator=generator) - 0.5) * min(size) / 50
    corner = torch.rand(750, 2, generator=generator) * torch.tensor([width - 32, height - 32])
    boxes = torch.cat([near, torch.cat([corner, corner + 32], 1)]).to(device)
    return InstanceData(bboxes=boxes, scores=boxes.new_ones(1000), labels=boxes.new_zeros(1000))


def _samples(shape: Shape, device: torch.device) -> list[object]:
    """Returns the ground truth of each image: 8 boxes with their masks."""
    import numpy
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    batch, _, *size = shape
    height, width = size
    boxes = _boxes((height, width))
    masks = numpy.zeros((8, height, width), dtype=numpy.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sizes = ("img_shape", "ori_shape", "pad_shape", "batch_input_shape")
    samples = []
    for _ in range(batch):
        metainfo = {**dict.fromkeys(sizes, (height, width)), "scale_factor": (1.0, 1.0)}
        samples.append(DetDataSample(metainfo=metainfo))
        samples[-1].gt_instances = InstanceData(
            bboxes=boxes.to(device),
            labels=torch.arange(8, device=device),
            masks=BitmapMasks(masks, height, width),
        )
    return samples


def training(model: nn.Module, shape: Shape, clock: Clock, dtype: torch.dtype) -> Run:
    image = torch.randn(shape, device=clock.device)
    size = shape[2], shape[3]
    propose = model.rpn_head.loss_and_predict

    def propose_the_same(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        """Replaces the proposals, which are random in an untrained model."""
        losses, found = propose(*arguments, **options)
        return losses, [_proposals(size, clock.device) for _ in found]

    def run() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)  # which proposals are sampled
        with (
            autocast(clock.device, dtype),
            mock.patch.object(model.rpn_head, "loss_and_predict", propose_the_same),
        ):
            losses = model(image, _samples(shape, clock.device), mode="loss")
        total, _ = model.parse_losses(losses)
        total.backward()

    return run
