"""Times backbones and Mask R-CNN against stock Swin and VOLO: inference and training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from elsa_core import VARIANTS, ELSASwin, ELSAVoloClassifier, layers

from . import detectors
from .clock import Clock, Run, captured
from .detectors import Shape, autocast, stock_options
from .measure import Row, compare, compare_parts
from .operator import KERNEL, unfold_path

NEEDS = {"detector": "mmdet", "parts": "mmdet"}
"""Parts that cannot do without a package."""


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
        case = _case(name, batch, size)
        built = {which: model.to(clock.device) for which, model in models(name, size).items()}
        for step, make in steps.items():
            runs = {which: make(model, shape, clock, dtype) for which, model in built.items()}
            eager = dict(runs)
            if name in VARIANTS:
                runs |= _on_unfold_path(runs["elsa"])
            if part == "backbone" and clock.device.type == "cuda":
                runs |= _graphs(eager)
            rows += compare(part, case, step, runs, clock, rounds, budget)
    return rows


def measure_parts(
    clock: Clock,
    dtype: torch.dtype,
    names: Sequence[str],
    batch: int,
    size: tuple[int, int],
    rounds: int,
) -> list[Row]:
    """Times inference of Mask R-CNN part by part, with this project's heads and MMDetection's.

    Raises:
        RuntimeError: contenders with unequal proposals, detections or masks.
    """
    shape = (batch, 3, *size)
    rows = []
    for name in names:
        built = {which: detectors.detector(name, which) for which in detectors.OF_PARTS}
        models = {which: model.to(clock.device) for which, model in built.items()}
        detectors.check_equal_work(models, shape, clock.device)
        options = shape, clock, dtype
        wholes = {which: detectors.inference(model, *options) for which, model in models.items()}
        parts = {
            which: detectors.inference_parts(model, *options) for which, model in models.items()
        }
        rows += compare_parts(_case(name, batch, size), wholes, parts, clock, rounds)
    return rows


def _case(name: str, batch: int, size: tuple[int, int]) -> str:
    return f"{name} {size[0]}x{size[1]}" + ("" if batch == 1 else f", batch {batch}")


def _graphs(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Captures each run as a CUDA graph; says which contender cannot be captured, and why."""
    graphs: dict[str, Run] = {}
    for name, run in runs.items():
        try:
            graphs[f"{name}, CUDA graph"] = captured(run)
        except RuntimeError as error:
            print(f"{name}, CUDA graph left out: {str(error).partition(chr(10))[0]}", flush=True)
    return graphs


def _step(model: nn.Module, shape: Shape, clock: Clock, dtype: torch.dtype, train: bool) -> Run:
    image = torch.randn(shape, device=clock.device)

    def run() -> None:
        model.train(train)
        if train:
            model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train), autocast(clock.device, dtype):
            outs = model(image)
        if train:
            found = [out for out in outs if isinstance(out, Tensor) and out.requires_grad]
            sum(out.float().mean() for out in found).backward()

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


class _TrainedOnTokens(nn.Module):
    """timm's VOLO that gives the logits of the patch tokens in training, as its recipe needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return self.model(x)
        token, aux, box = self.model.forward_train(x)
        return self.model.head(token), aux, box


def _volos(name: str, size: tuple[int, int]) -> dict[str, nn.Module]:
    """Returns the classifiers ELSA-VOLO and timm's VOLO, made for images of this size.

    Raises:
        RuntimeError: they give logits of unequal shapes.
    """
    models: dict[str, nn.Module] = {"elsa": ELSAVoloClassifier(name, mix_token=False)}
    if not find_spec("timm"):
        print("timm volo left out: timm is not installed", flush=True)
        return models
    import timm

    models["timm volo"] = _TrainedOnTokens(timm.create_model(f"{name}_224", img_size=size))
    for train in (False, True):
        image = torch.empty(2, 3, *size, device="meta")
        shapes = {}
        for which, model in models.items():
            outs = copy.deepcopy(model).to("meta").train(train)(image)
            shapes[which] = [out.shape for out in (outs[:2] if train else [outs])]
        if shapes["elsa"] != shapes["timm volo"]:
            raise RuntimeError(f"both must give the same logits, got {shapes}")
    return models


def _backbones(name: str, size: tuple[int, int]) -> dict[str, nn.Module]:
    """Returns ELSA-Swin and a Swin of the same size: MMDetection's, else timm's, else none.

    Of ELSA-VOLO the classifier, which is timm's way to build a VOLO.
    """
    if name not in VARIANTS:
        return _volos(name, size)
    models: dict[str, nn.Module] = {"elsa": ELSASwin(name)}
    if find_spec("mmdet"):
        from mmdet.models.backbones import SwinTransformer

        models["stock swin"] = SwinTransformer(**stock_options(name))
    elif find_spec("timm"):
        import timm

        options = {"features_only": True, "img_size": size, "drop_path_rate": 0.0}
        models["timm swin"] = timm.create_model(f"swin_{name}_patch4_window7_224", **options)
    else:
        print("stock swin left out: neither mmdet nor timm is installed", flush=True)
    return models


# For each part: the function that builds the contenders, and the steps to time.
_Models = Callable[[str, tuple[int, int]], dict[str, nn.Module]]
_PARTS: dict[str, tuple[_Models, dict[str, Callable[..., Run]]]] = {
    "backbone": (
        _backbones,
        {"inference": partial(_step, train=False), "training step": partial(_step, train=True)},
    ),
    "mask rcnn": (
        detectors.detectors,
        {"inference": detectors.inference, "training step": detectors.training},
    ),
}
