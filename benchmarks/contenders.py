"""Times the backbone and Mask R-CNN against mmdet's stock Swin: inference and training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from elsa_core import VARIANTS, ELSASwin, layers

from .clock import Clock, Run
from .measure import Row, compare
from .operator import KERNEL, unfold_path

CONFIGS = Path(__file__).resolve().parents[1] / "configs/mmdet/elsa_swin"
CONFIG = "mask-rcnn_elsa-swin-{}-p4-w7_fpn_amp-ms-crop-1x_coco.py"


def measure_models(
    part: str,
    clock: Clock,
    dtype: torch.dtype,
    names: Sequence[str],
    size: tuple[int, int],
    rounds: int,
    budget: float,
) -> list[Row]:
    """Times the variants ``names`` of a part, "backbone" or "mask rcnn"."""
    build, steps = _PARTS[part]
    rows = []
    for name in names:
        ours, stock = (build(name, which).to(clock.device) for which in ("elsa", "swin"))
        case = f"{name} {size[0]}x{size[1]}"
        for step, make in steps.items():
            plain = make(ours, size, clock, dtype)
            runs = {"elsa": plain, "stock swin": make(stock, size, clock, dtype)}
            runs |= _on_unfold_path(plain)
            rows += compare(part, case, step, runs, clock, rounds, budget)
    return rows


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Computes in ``dtype`` with float32 parameters, as in training."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _step(
    model: nn.Module, size: tuple[int, int], clock: Clock, dtype: torch.dtype, train: bool
) -> Run:
    image = torch.randn(1, 3, *size, device=clock.device)

    def run() -> None:
        model.train(train)
        if train:
            model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train), _autocast(clock.device, dtype):
            outs = model(image)
        if train:
            sum(out.float().mean() for out in outs).backward()

    return run


def _on_unfold_path(run: Run) -> dict[str, Run]:
    """Runs the model with the unfold path for every operator, plain and with torch.compile."""

    def with_operator(path: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        def attention(
            value: Tensor, logits: Tensor, ghost_add: Tensor, ghost_mul: None, *, kernel_size: int
        ) -> Tensor:
            assert kernel_size == KERNEL and ghost_mul is None
            if torch.is_autocast_enabled(value.device.type):
                ghost_add = ghost_add.to(value.dtype)
            out = path(
                value.permute(0, 3, 1, 2), logits.permute(0, 3, 1, 2).contiguous(), ghost_add
            )
            return out.permute(0, 2, 3, 1)

        def patched() -> None:
            with mock.patch.object(layers, "elsa_attention", attention):
                run()

        return patched

    torch._dynamo.reset()  # at most 8 shapes are compiled for one function
    return {
        "elsa, unfold path": with_operator(unfold_path),
        "elsa, compiled unfold": with_operator(torch.compile(unfold_path, dynamic=False)),
    }


def _stock_options(name: str) -> dict[str, object]:
    arch = VARIANTS[name]
    return {
        "embed_dims": arch.embed_dim,
        "depths": arch.depths,
        "num_heads": arch.num_heads,
        "window_size": arch.window_size,
        "drop_path_rate": 0.0,
    }


def _backbone(name: str, which: str) -> nn.Module:
    from mmdet.models.backbones import SwinTransformer

    return ELSASwin(name) if which == "elsa" else SwinTransformer(**_stock_options(name))


def _detector(name: str, which: str) -> nn.Module:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules(init_default_scope=True)
    config = Config.fromfile(CONFIGS / CONFIG.format(name[0]))
    if which == "swin":
        config.model.backbone = {"type": "SwinTransformer", **_stock_options(name)}
    else:
        config.model.backbone.drop_path_rate = 0.0
    config.model.backbone.pop("init_cfg", None)
    torch.manual_seed(0)
    return MODELS.build(config.model)


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


def _samples(size: tuple[int, int], device: torch.device) -> list[object]:
    """Returns the ground truth of one image: 8 boxes with their masks."""
    import numpy
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    height, width = size
    boxes = _boxes(size)
    masks = numpy.zeros((8, height, width), dtype=numpy.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(
        metainfo={
            **dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size),
            "scale_factor": (1.0, 1.0),
        }
    )
    sample.gt_instances = InstanceData(
        bboxes=boxes.to(device),
        labels=torch.arange(8, device=device),
        masks=BitmapMasks(masks, height, width),
    )
    return [sample]


def _detection(model: nn.Module, size: tuple[int, int], clock: Clock, dtype: torch.dtype) -> Run:
    """Runs inference with fixed proposals and scores, because those of untrained heads are random.

    The RPN and the box head compute as usual. Then every model continues with the same 1000
    proposals, and with the same class scores and boxes before the last NMS, of which 100 become
    detections with masks.
    """
    image = torch.randn(1, 3, *size, device=clock.device)
    propose, decode = model.rpn_head.predict, model.roi_head.bbox_head.predict_by_feat
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(1000, 81, generator=generator) * 3).to(clock.device)
    deltas = torch.zeros(1000, 320, device=clock.device)

    def propose_the_same(*arguments: Any, **options: Any) -> Any:
        return [_proposals(size, clock.device) for _ in propose(*arguments, **options)]

    def decode_the_same(*arguments: Any, **options: Any) -> Any:
        return decode(*arguments, **{**options, "cls_scores": (scores,), "bbox_preds": (deltas,)})

    def run() -> None:
        model.eval()
        with (
            torch.no_grad(),
            _autocast(clock.device, dtype),
            mock.patch.object(model.rpn_head, "predict", propose_the_same),
            mock.patch.object(model.roi_head.bbox_head, "predict_by_feat", decode_the_same),
        ):
            (sample,) = model(image, _samples(size, clock.device), mode="predict")
        found = sample.pred_instances
        assert len(found) == len(found.masks) == 100, f"{len(found)} detections instead of 100"

    return run


def _detector_training(
    model: nn.Module, size: tuple[int, int], clock: Clock, dtype: torch.dtype
) -> Run:
    image = torch.randn(1, 3, *size, device=clock.device)
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
            _autocast(clock.device, dtype),
            mock.patch.object(model.rpn_head, "loss_and_predict", propose_the_same),
        ):
            losses = model(image, _samples(size, clock.device), mode="loss")
        total, _ = model.parse_losses(losses)
        total.backward()

    return run


# For each part: the function that builds a model, and the steps to time.
_PARTS: dict[str, tuple[Callable[[str, str], nn.Module], dict[str, Callable[..., Run]]]] = {
    "backbone": (
        _backbone,
        {"inference": partial(_step, train=False), "training step": partial(_step, train=True)},
    ),
    "mask rcnn": (_detector, {"inference": _detection, "training step": _detector_training}),
}
