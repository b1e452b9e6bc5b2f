"""What MMDetection's data sets must agree on with pipelines and heads."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config
from torch import nn

from elsa_core.runtime.errors import UsageError

from .nested import leaves, walk


def check_polygons(cfg: Config, dataset: Any) -> None:
    """MMDetection ignores masks that are no polygons where `poly2mask` is False."""
    steps = walk([cfg.train_dataloader, cfg.get("custom_hooks") or []])
    count = sum(getattr(leaf, "run_lengths", 0) for leaf in leaves(dataset))
    if count and any(step.get("with_mask") and not step.get("poly2mask", True) for step in steps):
        raise UsageError(
            f"LoadAnnotations needs poly2mask=True in all training pipelines, also those of hooks: "
            f"with False, it ignores the {count} objects of the train data whose masks are run "
            "lengths"
        )


def check_things(model: nn.Module, dataset: Any, part: str) -> None:
    """Panoptic heads count things from label 0 on."""
    things = getattr(dataset, "things", None)
    for name, module in model.named_modules():
        number = getattr(module, "num_things_classes", None)
        if name and things is not None and number is not None and number != things:
            raise UsageError(
                f"model.{name}.num_things_classes must be the {things} things of the {part} data, "
                f"got {number}"
            )
