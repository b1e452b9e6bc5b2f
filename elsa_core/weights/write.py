"""Write converted checkpoints atomically, and never over their source."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elsa_core import __version__
from elsa_core.runtime.errors import UsageError, printable
from elsa_core.runtime.files import replacing

from . import safetensors
from .convert import Conversion
from .progress import CountedFile
from .shapes import arch_name, describe
from .source import BACKBONE, CLASSIFIER, DETECTRON2
from .volo import Volo

SUFFIXES = (".pth", ".safetensors")
_BLOCK = 2**20


def check_destination(source: str, destination: str) -> None:
    """Raise UsageError, before any work, if the destination must not or cannot be written."""
    if not destination.endswith(SUFFIXES):
        raise UsageError(f"DST must end in {' or '.join(SUFFIXES)}, got {destination}")
    if os.path.isdir(destination):
        raise UsageError(f"DST {destination} is a directory")
    folder = os.path.dirname(destination) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"DST's folder {folder} does not exist")
    if os.path.exists(destination) and os.path.samefile(source, destination):
        raise UsageError(f"DST {destination} is SRC itself, which is never overwritten")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"DST {destination} cannot be written: no permission in its folder")


def sha256(path: str) -> str:
    digest = hashlib.sha256()
    size = os.path.getsize(path)
    with open(path, "rb") as file, CountedFile(file, "hashing", size) as counted:
        while block := counted.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def metadata(conversion: Conversion, source_file: str, source_sha256: str) -> dict[str, Any]:
    """Return DST's metadata in plain types; the same for the same source."""
    source, sizes = conversion.source, conversion.sizes
    about: dict[str, Any] = {
        "tool": f"elsa-swin {__version__}",
        "source": os.path.basename(source_file),
        "source_sha256": source_sha256,
        "source_is": str(source),
        "to": conversion.to,
        "kind": source.kind,
        "arch": describe(source.backbone),
    }
    if sizes is not None:
        about["num_classes"] = sizes.num_classes
    meta: dict[str, Any] = {"converted": about}
    classes, palette = dataset_meta(source.meta)
    dataset = {"classes": classes, "palette": palette}
    if dataset := {key: value for key, value in dataset.items() if value}:
        meta["dataset_meta"] = dataset
        if conversion.to == "original":  # the keys of mmdet 2.x and mmseg 0.x
            meta |= {key.upper(): value for key, value in dataset.items()}
    return meta


def class_names(checkpoint: Any) -> tuple[list[str] | None, list[list[int]] | None]:
    """Return class names and colours from the content of a checkpoint; None if missing."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, Mapping) else None
    return dataset_meta(meta) if isinstance(meta, Mapping) else (None, None)


def dataset_meta(meta: Mapping[str, Any]) -> tuple[list[str] | None, list[list[int]] | None]:
    """Return class names and colours from any place that a checkpoint's ``meta`` has for them."""
    inner = meta.get("dataset_meta")
    if isinstance(inner, str):  # safetensors
        try:
            inner = json.loads(inner)
        except (RecursionError, ValueError):
            inner = None
    places = [inner if isinstance(inner, Mapping) else {}, meta]
    found: list[Any] = []
    for key in ("classes", "palette"):
        values = [place.get(name) for place in places for name in (key, key.upper())]
        found.append(next((v for v in values if isinstance(v, Sequence) and v), None))
    classes, palette = found
    if not (classes and not isinstance(classes, str) and all(isinstance(c, str) for c in classes)):
        classes = None
    else:  # logs and pictures show them
        classes = [printable(name) for name in classes]
    try:
        palette = [[int(part) for part in colour] for colour in palette] if palette else None
    except (OverflowError, TypeError, ValueError):  # some data sets name a palette instead
        palette = None
    return list(classes) if classes else None, palette


def write_checkpoint(
    destination: str,
    conversion: Conversion,
    meta: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write DST atomically, in the container that its framework expects.

    Raises:
        UsageError: the destination cannot be written; no file is left.
    """
    tensors = {name: _alone(tensor) for name, tensor in conversion.tensors.items()}
    size = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    folder = os.path.dirname(destination) or "."
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UsageError(
            f"DST {destination} needs {size / 1e6:.0f} MB, and its disk has {free / 1e6:.0f} MB"
        )
    with replacing(destination) as file, CountedFile(file, "writing", size) as counted:
        if destination.endswith(".safetensors"):
            text = {key: json.dumps(value) for key, value in meta.items()}
            safetensors.save(counted, tensors, {"format": "pt", **text})  # type: ignore[arg-type]
        else:
            checkpoint = _container(conversion, tensors, meta, training or {})
            torch.save(checkpoint, counted)  # type: ignore[arg-type]


def _container(
    conversion: Conversion,
    tensors: dict[str, Tensor],
    meta: Mapping[str, Any],
    training: Mapping[str, Any],
) -> dict[str, Any]:
    if conversion.to == "detectron2":
        return {"model": tensors, "__author__": "elsa-swin", "meta": dict(meta), **training}
    checkpoint = {"meta": dict(meta), "state_dict": tensors, **training}
    if conversion.to == "backbone":
        # The same tensors again, under the key that Detectron2 expects.
        checkpoint |= {"model": tensors, "__author__": "elsa-swin", "matching_heuristics": True}
    if conversion.to == "original" and conversion.source.kind in (CLASSIFIER, BACKBONE):
        family = "elsa_volo" if isinstance(conversion.source.backbone, Volo) else "elsa_swin"
        name = arch_name(conversion.source.arch).removeprefix("volo_")
        checkpoint["arch"] = f"{family}_{name}"
    return checkpoint


def training_state(conversion: Conversion) -> dict[str, Any]:
    """Return SRC's training state, unchanged, for a DST of the same framework.

    Raises:
        UsageError: the state does not match DST's framework, or is not plain data.
    """
    source = conversion.source
    same = (source.family == DETECTRON2) == (conversion.to == "detectron2")
    if not same or source.is_stock or conversion.to in ("backbone", "mmpretrain"):
        raise UsageError(
            "the training state can only be kept within one framework: an optimizer numbers the "
            f"parameters, and {conversion.to} has others or orders them differently than {source}"
        )
    for key, value in source.training.items():
        if kind := _not_plain(value):
            raise UsageError(f"the training state cannot be kept: its {key} has an object {kind}")
    return source.training


def _not_plain(value: Any) -> str | None:
    if isinstance(value, Tensor) or type(value) in (type(None), bool, int, float, str, bytes):
        return None
    if type(value) in (list, tuple):
        children = list(value)
    elif isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        children = [*value.keys(), *value.values()]
    else:
        return type(value).__name__
    return next((kind for kind in map(_not_plain, children) if kind), None)


def _alone(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor with signs and conjugates resolved and a storage of its own:
    torch.save would write a larger storage as a whole."""
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.dtype.itemsize
    return tensor if whole else tensor.clone()
