"""Recognise a checkpoint from its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from elsa_core.layers import relative_position_id
from elsa_core.runtime.errors import UsageError

from .averages import BESIDE, has_both, trained
from .names import CASCADE, D2_BACKBONES, MASK_RCNN, UPERNET, rename
from .shapes import Backbone, arch_name, output_dims, read_backbone
from .source import (
    BACKBONE,
    BACKBONE_FILE,
    CLASSIFIER,
    DETECTRON2,
    MMPRETRAIN,
    OPENMMLAB,
    ORIGINAL,
    OTHER,
    Source,
)
from .swin import is_warm_start, recognise_swin, recognise_warm_start
from .unpickle import Array
from .volo import CLASS_PARTS, tops_of
from .volo_start import is_volo, recognise_volo

TRAINING_STATE = set(
    "amp amp_scaler ema_state_dict epoch iteration loss_scaler lr_scheduler message_hub optimizer "
    "param_schedulers scaler scheduler trainer".split()
)
_WEIGHTS = ("state_dict", "model")
_EMA = "state_dict_ema"
# Parts that torch.compile, FSDP and activation checkpointing add to names.
WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
# A tensor that every model has, after a prefix such as Lightning's "model.".
_BACKBONE_KEY = re.compile(
    r"((?:.*?\.)??)(?:backbone\.)?(?:bottom_up\.)?patch_embed\.(?:proj|projection)\.weight"
)
_LONGEST_NAME = 400
# In RGB order, as in older Detectron2 checkpoints. The model has the same input in each framework.
PIXELS = {"pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}


def recognise(checkpoint: Any, *, ema: bool | None = None) -> Source:
    """Recognise the content that `elsa_core.weights.read.read_checkpoint` returns.

    Args:
        ema: use the averaged weights of a classification training. None: use them if they are the
            published ones (base variant) or the checkpoint's ``state_dict`` (OpenMMLab's EMAHook).

    Raises:
        UsageError: the checkpoint is of no known kind.
    """
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise UsageError(f"it holds an object of type {kind}, not named tensors")
    if not checkpoint:
        raise UsageError("it holds an empty dict")
    weights, rest = _unwrap(checkpoint)
    if has_both(rest):
        averaged = ema is not False
        if not averaged:
            weights = trained(rest)
            del rest[BESIDE]
        source = _recognise(_tensors(weights))
        source.ema, source.has_both = averaged, True
        return _with_rest(source, rest)
    tensors = _tensors(weights)
    if isinstance(rest.get(_EMA), Mapping):
        source = _recognise(_tensors(rest[_EMA]))
        source.ema = arch_name(source.arch) == "base" if ema is None else ema
        if not source.ema:
            source = _recognise(tensors)
        source.has_both = True
        return _with_rest(source, rest)
    if ema:
        raise UsageError(f"it holds no EMA weights ({_EMA})")
    return _with_rest(_recognise(tensors), rest)


def _unwrap(checkpoint: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return the named tensors and the other entries of a checkpoint."""
    for key in _WEIGHTS:
        if isinstance(checkpoint.get(key), Mapping):
            if not checkpoint[key]:
                raise UsageError(f"its {key} is an empty dict")
            return checkpoint[key], {k: v for k, v in checkpoint.items() if k not in _WEIGHTS}
    if not any(isinstance(value, (Tensor, Array)) for value in checkpoint.values()):
        names = [str(name)[:80] for name in checkpoint if isinstance(name, (int, str))]
        raise UsageError(f"it holds no tensors, but {', '.join(names[:5])}")
    return checkpoint, {}


def _tensors(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for name, value in weights.items():
        value = value.tensor if isinstance(value, Array) else value
        if not isinstance(name, str):
            raise UsageError(f"its tensors must have names, got a {type(name).__name__}")
        if not name.isprintable():
            raise UsageError(f"among its tensors, {name[:80]!r} has control characters in its name")
        if len(name) > _LONGEST_NAME:
            raise UsageError(
                f"the names of its tensors must have at most {_LONGEST_NAME} characters, "
                f"{name[:80]}... has {len(name)}"
            )
        if not isinstance(value, Tensor):
            raise UsageError(f"among its tensors, {name[:80]} is of type {type(value).__name__}")
        if value.layout != torch.strided or value.is_quantized:
            raise UsageError(f"its tensor {name} is sparse or quantized")
        tensors[name] = value.detach()
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _with_rest(source: Source, rest: dict[str, Any]) -> Source:
    source.training = {key: value for key, value in rest.items() if key in TRAINING_STATE}
    meta = rest.get("meta")
    source.meta = dict(meta) if isinstance(meta, Mapping) else {}
    return source


def _recognise(tensors: dict[str, Tensor]) -> Source:
    tensors, prefix, outside = _without_prefix(tensors)
    if is_volo(tensors):
        source = recognise_volo(tensors)
    elif is_warm_start(tensors):
        source = recognise_warm_start(tensors)
    elif any(".attn.pre_proj." in name for name in tensors):
        source = _elsa(tensors)
    elif any(".attn.qkv." in name or ".attn.w_msa.qkv." in name for name in tensors):
        source = recognise_swin(tensors)
    else:
        names = ", ".join(list(tensors)[:3])
        raise UsageError(
            "it holds no ELSA-Swin or ELSA-VOLO, nor a Swin or VOLO: its tensors have names like "
            f"{names}"
        )
    source.dropped += [(name, f"outside of {prefix}, with which the model's names begin")
                       for name in outside]  # fmt: skip
    return source


def _without_prefix(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str, list[str]]:
    """Return the model's tensors without the prefix of compiled, sharded and wrapped models, that
    prefix, and the names without it."""
    tensors = {WRAPPERS.sub(r"\1", name): value for name, value in tensors.items()}
    prefixes = sorted({found[1] for name in tensors if (found := _BACKBONE_KEY.fullmatch(name))})
    if not prefixes or "" in prefixes:
        return tensors, "", []
    if len(prefixes) > 1:
        raise UsageError(f"it holds several models, with the prefixes {', '.join(prefixes)}")
    (prefix,) = prefixes
    named = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return named, prefix, [name for name in tensors if not name.startswith(prefix)]


def _elsa(tensors: dict[str, Tensor]) -> Source:
    tops = {name.split(".")[0] for name in tensors}
    if tops & {"roi_heads", "sem_seg_head", "proposal_generator"} or any(
        name.startswith(D2_BACKBONES[MASK_RCNN]) for name in tensors
    ):
        return _detectron2(tensors, tops)
    if "backbone" in tops:
        return _openmmlab(tensors, tops)
    classifier = "norm" in tops or bool(tops & set(CLASS_PARTS)) and "norm0" not in tops
    kept, dropped = _drop_bookkeeping(tensors, "")
    return Source(
        family=ORIGINAL if classifier or dropped else BACKBONE_FILE,
        kind=CLASSIFIER if classifier else BACKBONE,
        backbone=read_backbone(tensors),
        tensors={name: (name, tensor) for name, tensor in kept.items()},
        dropped=dropped,
    )


def _openmmlab(tensors: dict[str, Tensor], tops: set[str]) -> Source:
    kept, dropped = _drop_bookkeeping(tensors, "backbone.")
    backbone = read_backbone(tensors, "backbone.")
    if "head" in tops and tops <= {"backbone", "head"}:
        return _mmpretrain(backbone, kept, dropped)
    named = {name: (name, tensor) for name, tensor in kept.items()}
    if any(name.startswith("roi_head.bbox_head.0.") for name in tensors):
        kind = CASCADE
    elif "roi_head" in tops:
        kind = MASK_RCNN
    elif "decode_head" in tops:
        kind = UPERNET
    elif tops == {"backbone"}:
        named = {name.removeprefix("backbone."): value for name, value in named.items()}
        kind = CLASSIFIER if tops_of(named) & set(CLASS_PARTS) else BACKBONE
    else:
        kind = OTHER
    return Source(ORIGINAL if dropped else OPENMMLAB, kind, backbone, named, dropped)


def _mmpretrain(
    backbone: Backbone, tensors: dict[str, Tensor], dropped: list[tuple[str, str]]
) -> Source:
    last = f"backbone.norm{len(output_dims(backbone)) - 1}."
    named = {}
    for name, tensor in tensors.items():
        new = name.replace(last, "norm.") if name.startswith(last) else name
        new = new.removeprefix("backbone.").replace("head.fc.", "head.")
        new = new.replace("head.aux_fc.", "aux_head.")
        named[new] = (name, tensor)
    return Source(MMPRETRAIN, CLASSIFIER, backbone, named, dropped)


def _detectron2(tensors: dict[str, Tensor], tops: set[str]) -> Source:
    if "sem_seg_head" in tops:
        kind = UPERNET
    elif any(name.startswith("roi_heads.box_predictor.0.") for name in tensors):
        kind = CASCADE
    elif "roi_heads" in tops:
        kind = MASK_RCNN
    else:
        kind = BACKBONE if tops == {"backbone"} else OTHER
    kept, dropped = _drop_pixels_and_anchors(tensors)
    prefix = D2_BACKBONES.get(kind, "backbone.bottom_up.")
    kept, bookkeeping = _drop_bookkeeping(kept, prefix)
    dropped += bookkeeping
    backbone = read_backbone(kept, prefix)
    if kind in D2_BACKBONES:
        named, unknown = rename(kept, kind, "mm")
        if unknown:
            raise UsageError(
                f"{len(unknown)} of its tensors are unknown in a model of this kind, "
                f"the first is {unknown[0]}"
            )
        return Source(DETECTRON2, kind, backbone, named, dropped)
    named = {}
    for name, tensor in kept.items():
        inside = name.startswith(prefix)
        new = "" if kind == BACKBONE and inside else "backbone." if inside else "other."
        named[new + name.removeprefix(prefix)] = (name, tensor)
    return Source(DETECTRON2, kind, backbone, named, dropped)


def _drop_bookkeeping(
    tensors: dict[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Drop the original's buffers that follow from the architecture."""
    kept, dropped = {}, []
    for name, tensor in tensors.items():
        if name.startswith(prefix + "layers.") and name.endswith(".attn.relative_id"):
            window = round(tensor.numel() ** 0.25)
            if not torch.equal(tensor.flatten().long(), relative_position_id(window)):
                raise UsageError(f"{name} orders the position biases in an unknown way")
            dropped.append((name, "bookkeeping of the original, follows from the window size"))
        elif name.startswith(prefix + "layers.") and name.endswith(".attn_mask"):
            dropped.append((name, "bookkeeping of the original, follows from the image's size"))
        else:
            kept[name] = tensor
    return kept, dropped


def _drop_pixels_and_anchors(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    kept, dropped = {}, []
    for name, tensor in tensors.items():
        if name in PIXELS:
            wanted = torch.tensor(PIXELS[name])
            got = tensor.flatten().float()
            if got.shape != wanted.shape or not torch.allclose(got, wanted, atol=1e-3):
                raise UsageError(
                    f"its {name} must be ImageNet's in RGB order, {list(PIXELS[name])}, "
                    f"got {got[:6].tolist()}"
                )
            dropped.append((name, "stands in the config"))
        elif "anchor_generator.cell_anchors" in name:
            dropped.append((name, "follows from the config"))
        else:
            kept[name] = tensor
    return kept, dropped
