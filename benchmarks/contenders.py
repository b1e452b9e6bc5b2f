"""Times the backbone and Mask R-CNN against stock Swin: inference and training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from elsa_core import VARIANTS, ELSASwin, layers

from .clock import Clock, Run, captured
from .measure import Row, compare
from .operator import KERNEL, unfold_path

CONFIGS = Path(__file__).resolve().parents[1] / "configs/mmdet/elsa_swin"
CONFIG = "mask-rcnn_elsa-swin-{}-p4-w7_fpn_amp-ms-crop-1x_coco.py"
NEEDS = {"detector": "mmdet"}
"""Parts that cannot do without a package."""

Shape = tuple[int, int, int, int]  # of the images: batch, 3, height, width


def measure_models(
    part: str,
    clock: Clock,
    dtype: torch.dtype,
    names: Sequence[str],
    batch: int,
    size: tuple[int, int],
    rounds: int,
    budget: float,
) -> list[Row]:
    """Times the variants ``names`` of a part, "backbone" or "mask rcnn".

    On a GPU the eager backbones also run as CUDA graphs, without the gaps between launches.
    """
    models, steps = _PARTS[part]
    shape = (batch, 3, *size)
    rows = []
    for name in names:
        case = f"{name} {size[0]}x{size[1]}" + ("" if batch == 1 else f", batch {batch}")
        built = {which: model.to(clock.device) for which, model in models(name, size).items()}
        for step, make in steps.items():
            runs = {which: make(model, shape, clock, dtype) for which, model in built.items()}
            eager = dict(runs)
            runs |= _on_unfold_path(runs["elsa"])
            if part == "backbone" and clock.device.type == "cuda":
                runs |= _graphs(eager)
            rows += compare(part, case, step, runs, clock, rounds, budget)
    return rows


def _graphs(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Captures each run as a CUDA graph; says which contender cannot be captured, and why."""
    graphs: dict[str, Run] = {}
    for name, run in runs.items():
        try:
            graphs[f"{name}, CUDA graph"] = captured(run)
        except RuntimeError as error:
            print(f"{name}, CUDA graph left out: {str(error).partition(chr(10))[0]}", flush=True)
    return graphs


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Computes in ``dtype`` with float32 parameters, as in training."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _step(model: nn.Module, shape: Shape, clock: Clock, dtype: torch.dtype, train: bool) -> Run:
    image = torch.randn(shape, device=clock.device)

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


def _backbones(name: str, size: tuple[int, int]) -> dict[str, nn.Module]:
    """Returns ELSA-Swin and a Swin of the same size: MMDetection's, else timm's, else none."""
    models: dict[str, nn.Module] = {"elsa": ELSASwin(name)}
    if find_spec("mmdet"):
        from mmdet.models.backbones import SwinTransformer

        models["stock swin"] = SwinTransformer(**_stock_options(name))
    elif find_spec("timm"):
        import timm

        options = {"features_only": True, "img_size": size, "drop_path_rate": 0.0}
        models["timm swin"] = timm.create_model(f"swin_{name}_patch4_window7_224", **options)
    else:
        print("stock swin left out: neither mmdet nor timm is installed", flush=True)
    return models


def _detectors(name: str, size: tuple[int, int]) -> dict[str, nn.Module]:
    return {which: _detector(name, which) for which in ("elsa", "stock swin")}


def _detector(name: str, which: str) -> nn.Module:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules(init_default_scope=True)
    config = Config.fromfile(CONFIGS / CONFIG.format(name[0]))
    if which == "stock swin":
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


def _detection(model: nn.Module, shape: Shape, clock: Clock, dtype: torch.dtype) -> Run:
    """Runs inference with fixed proposals and scores, because those of untrained heads are random.

    The RPN and the box head compute as usual. Then every model continues with the same 1000
    proposals, and with the same class scores and boxes before the last NMS, of which 100 become
    detections with masks.
    """
    image = torch.randn(shape, device=clock.device)
    size = shape[2], shape[3]
    propose, decode = model.rpn_head.predict, model.roi_head.bbox_head.predict_by_feat
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(1000, 81, generator=generator) * 3).to(clock.device)
    deltas = torch.zeros(1000, 320, device=clock.device)

    def propose_the_same(*arguments: Any, **options: Any) -> Any:
        return [_proposals(size, clock.device) for _ in propose(*arguments, **options)]

    def decode_the_same(*arguments: Any, **options: Any) -> Any:
        same = {"cls_scores": (scores,) * shape[0], "bbox_preds": (deltas,) * shape[0]}
        return decode(*arguments, **{**options, **same})

    def run() -> None:
        model.eval()
        with (
            torch.no_grad(),
            _autocast(clock.device, dtype),
            mock.patch.object(model.rpn_head, "predict", propose_the_same),
            mock.patch.object(model.roi_head.bbox_head, "predict_by_feat", decode_the_same),
        ):
            samples = model(image, _samples(shape, clock.device), mode="predict")
        for found in (sample.pred_instances for sample in samples):
            assert len(found) == len(found.masks) == 100, f"{len(found)} detections, not 100"

    return run


def _detector_training(model: nn.Module, shape: Shape, clock: Clock, dtype: torch.dtype) -> Run:
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
            _autocast(clock.device, dtype),
            mock.patch.object(model.rpn_head, "loss_and_predict", propose_the_same),
        ):
            losses = model(image, _samples(shape, clock.device), mode="loss")
        total, _ = model.parse_losses(losses)
        total.backward()

    return run


# For each part: the function that builds the contenders, and the steps to time.
_Models = Callable[[str, tuple[int, int]], dict[str, nn.Module]]
_PARTS: dict[str, tuple[_Models, dict[str, Callable[..., Run]]]] = {
    "backbone": (
        _backbones,
        {"inference": partial(_step, train=False), "training step": partial(_step, train=True)},
    ),
    "mask rcnn": (_detectors, {"inference": _detection, "training step": _detector_training}),
}
