"""Whether model, data and checkpoint fit each other, found before a run begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import distributed, nn
from torch.utils.data import BatchSampler

from elsa_core.runtime.errors import UsageError

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
    name, norm, least = _over_batch(cfg)
    if size < least:
        raise UsageError(
            f"train_dataloader.batch_size must be at least 2: {name} normalises maps of one "
            f"position over the batch ({norm}), got {size}"
        )


def check_last_batch(runner: Runner) -> None:
    """Raises UsageError if an epoch ends with a batch of this process that is too small for batch
    normalisation; the data is loaded."""
    loop = runner.train_loop
    batches = loop.dataloader.batch_sampler
    sampler = getattr(batches, "sampler", None)
    name, norm, least = _over_batch(runner.cfg)
    if type(batches) is not BatchSampler or isinstance(sampler, InfiniteSampler):
        return
    images, size = len(sampler), batches.batch_size
    ends = isinstance(loop, EpochBasedTrainLoop) or loop.max_iters >= len(batches)
    if ends and not batches.drop_last and 0 < images % size < least:
        raise UsageError(
            f"the last training batch of an epoch has 1 of the {images} images, in batches of "
            f"{size}, and {name} normalises maps of one position over the batch ({norm}): set "
            f"train_dataloader.drop_last=True or another batch_size"
        )


def _over_batch(cfg: Config) -> tuple[str, str, int]:
    """A head that normalises maps of one position over the images of a batch, its norm, and how
    many of these a process needs: 1 where that is no such head."""
    head = cfg.model.get("decode_head")
    if not isinstance(head, dict):
        return "", "", 1
    name, norm = str(head.get("type")), str((head.get("norm_cfg") or {}).get("type"))
    pools = name in ("UPerHead", "PSPHead") and 1 in head.get("pool_scales", (1, 2, 3, 6))
    pools |= name in ("ASPPHead", "DepthwiseSeparableASPPHead")  # the image's mean
    together = distributed.get_world_size() if distributed.is_initialized() else 1
    alone = norm == "BN" or norm == "SyncBN" and together == 1
    return name, norm, 2 if pools and alone else 1


def check_weights(model: nn.Module, path: str, content: Any, *, resumes: bool = False) -> None:
    """Raises UsageError unless a checkpoint holds every parameter of a model in its shape.

    MMEngine would go on with random values for the others.

    Args:
        content: of the file, which gets the names of the model.
        resumes: whether a training goes on from it.
    """
    model = plain_model(model)
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
