"""Whether model, data and checkpoint fit each other, found before a run begins."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import distributed, nn

from elsa_core.errors import UsageError

from .checkpoint import local_content
from .loading import adopt, check_progress, plain_model, unbuilt_model

# What has one output or label for each class of the data; an RPN has not.
_HEADS = re.compile(
    r"(module\.)*(data_preprocessor|head)|"
    r"(.+\.)?(bbox_head|mask_head|decode_head|auxiliary_head)(\.\d+)?"
)


def check_classes(runner: Runner, parts: Sequence[str]) -> None:
    """Raises UsageError if the heads have another number of classes than the data.

    Args:
        parts: "train", "val", "test": the loaders that the run uses.
    """
    heads = {
        name: module.num_classes
        for name, module in model_of(runner).named_modules()
        if _HEADS.fullmatch(name) and isinstance(getattr(module, "num_classes", None), int)
    }
    for part in parts:
        loop = getattr(runner, f"{part}_loop")
        dataset = None if loop is None else loop.dataloader.dataset
        classes = (getattr(dataset, "metainfo", None) or {}).get("classes")
        if classes is None:
            continue
        for name, number in heads.items():
            if number != len(classes):
                place = name if name == "data_preprocessor" else f"model.{name}"
                raise UsageError(
                    f"{place}.num_classes must be the {len(classes)} classes of the {part} "
                    f"data, got {number}"
                )
        found = getattr(dataset, "cat_ids", None)
        if found is not None and len(found) != len(classes):
            raise UsageError(
                f"the {part} data's annotation file must have all {len(classes)} classes of the "
                f"data set, it has {len(found)} of them"
            )


def model_of(runner: Runner) -> nn.Module:
    """The runner's model; where it is built later (FlexibleRunner), one without memory."""
    return runner.model if isinstance(runner.model, nn.Module) else unbuilt_model(runner.model)


def check_batch(cfg: Config) -> None:
    """Raises UsageError for a training batch that is empty or too small for batch normalisation."""
    size = cfg.train_dataloader.get("batch_size")
    if size is None:  # a batch sampler of its own
        return
    if not isinstance(size, int) or size < 1:
        raise UsageError(
            f"train_dataloader.batch_size must be an integer of at least 1, got {size}"
        )
    head = cfg.model.get("decode_head")
    if not isinstance(head, dict) or 1 not in head.get("pool_scales", (1, 2, 3, 6)):
        return
    norm = (head.get("norm_cfg") or {}).get("type")
    together = distributed.get_world_size() if distributed.is_initialized() else 1
    images = {"BN": size, "SyncBN": size * together}.get(norm)
    if head.get("type") in ("UPerHead", "PSPHead") and images == 1:
        raise UsageError(
            f"train_dataloader.batch_size must be at least 2: {head['type']} normalises maps of "
            f"one position over the batch ({norm}), got {size}"
        )


def check_weights(model: nn.Module, path: str, *, resumes: bool = False) -> None:
    """Raises UsageError unless a checkpoint holds every parameter of a model in its shape.

    MMEngine would go on with random values for the others. URLs pass.

    Args:
        resumes: whether a training goes on from it.
    """
    if "://" in path:
        return
    model, content = plain_model(model), local_content(path)
    adopt(model, content, path, resumes=resumes)
    state = content.get("state_dict", content)
    stored = {
        re.sub("^module\\.", "", name): tuple(tensor.shape)
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in wanted.items():
        if stored.get(name, shape) != shape:
            raise UsageError(
                f"the checkpoint {path} does not fit the model, is it of another number of classes "
                f"or another backbone: {name} has the shape {stored[name]} instead of {shape}"
            )
    if missing := [name for name in wanted if name not in stored]:
        raise UsageError(
            f"the checkpoint {path} does not fit the model: it lacks {len(missing)} of the "
            f"{len(wanted)} parameters, {missing[0]} for one"
        )
    if resumes:
        check_progress(content, path)
