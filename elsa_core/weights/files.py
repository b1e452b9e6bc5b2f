"""Convert checkpoint files, or load them straight into a model of another framework."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from elsa_core import ELSASwin
from elsa_core.checkpoint import drop_unused_keys
from elsa_core.runtime.errors import UsageError

from . import write
from .convert import Conversion, convert
from .names import D2_BACKBONES, RULES, UPERNET
from .read import read_checkpoint
from .recognise import recognise
from .source import BACKBONE, CLASSIFIER, DETECTRON2, OPENMMLAB, SWIN, Source


def read_source(path: str | os.PathLike, *, trust: bool = False, ema: bool | None = None) -> Source:
    """Read and recognise a checkpoint. Raise UsageError, naming the file, if either fails."""
    checkpoint = read_checkpoint(path, trust=trust)
    with naming(path):
        return recognise(checkpoint, ema=ema)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Add the file's name to a UsageError about its content."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{os.fspath(path)} cannot be converted: {error}") from error


def convert_file(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to: str,
    *,
    ema: bool | None = None,
    trust: bool = False,
    keep_training_state: bool = False,
    anchor_sizes: int | None = None,
) -> Conversion:
    """Convert a checkpoint file. The arguments are those of `recognise` and `convert`.

    Raises:
        UsageError: the conversion is not possible; nothing is written.
    """
    source, destination = os.fspath(source), os.fspath(destination)
    if keep_training_state and not destination.endswith(".pth"):
        raise UsageError(f"the training state can only be kept in a .pth file, got {destination}")
    checkpoint = read_checkpoint(source, trust=trust)
    write.check_destination(source, destination)
    with naming(source):
        conversion = convert(recognise(checkpoint, ema=ema), to, anchor_sizes=anchor_sizes)
        training = write.training_state(conversion) if keep_training_state else {}
    dropped = [key for key in conversion.source.training if key not in training]
    conversion.dropped += [(key, "training state") for key in dropped]
    meta = write.metadata(conversion, source, write.sha256(source))
    write.write_checkpoint(destination, conversion, meta, training)
    return conversion


def load_backbone(backbone: ELSASwin, path: str | os.PathLike) -> Conversion:
    """Load the backbone weights of any convertible checkpoint into an `elsa_core.ELSASwin`.

    A backbone that returns only the last stage's map counts as a classifier's: it also gets the
    final norm of a classifier's checkpoint.

    Raises:
        UsageError: as in `convert_file`, or if the checkpoint's backbone has another architecture;
            nothing is loaded.
    """
    source = read_source(path)
    keep = _returns_last_only(backbone)
    with naming(path):
        conversion = convert(source, "backbone", keep_norm=keep)
    tensors = _used(backbone, conversion)
    _check_fit(path, conversion, tensors, backbone.state_dict())
    backbone.load_state_dict(tensors, strict=False)
    return conversion


def checkpoint_for(
    model: nn.Module,
    path: str | os.PathLike,
    content: Any = None,
    *,
    to: str = DETECTRON2,
    anchor_sizes: int | None = None,
) -> dict[str, Any]:
    """Return a checkpoint of any framework as a dict for a Detectron2 or OpenMMLab model.

    ``model`` has the tensors under the model's names, ``meta`` the checkpoint's metadata. A
    checkpoint of another kind of model gives only its backbone, and no ``meta``.

    Args:
        content: content of the file if it has been read already.
        to: framework of the model, "detectron2" or "openmmlab".
        anchor_sizes: as in `convert`.

    Raises:
        UsageError: as in `load_backbone`, or if the model does not have exactly one ELSA-Swin.
    """
    names = model.state_dict()
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, ELSASwin)]
    if len(found) != 1:
        raise UsageError(f"{os.fspath(path)} needs a model with one ELSA-Swin, got {len(found)}")
    prefix, backbone = found[0]
    prefix += "." if prefix else ""
    checkpoint = read_checkpoint(path) if content is None else content
    with naming(path):
        source = recognise(checkpoint)
    if target := _whole_model(names, prefix, source, to):
        if target != source.family or source.kind == CLASSIFIER:
            with naming(path):
                tensors = convert(source, target, anchor_sizes=anchor_sizes).tensors
        elif to == DETECTRON2:
            tensors = dict(source.tensors.values())
        else:
            tensors = {name: tensor for name, (_, tensor) in source.tensors.items()}
        return {"model": tensors, "meta": source.meta}
    keep = to == OPENMMLAB and _returns_last_only(backbone)
    with naming(path):
        conversion = convert(source, "backbone", keep_norm=keep)
    given = {prefix + name: tensor for name, tensor in _used(backbone, conversion).items()}
    _check_fit(path, conversion, given, names, prefix)
    return {"model": given}


def _returns_last_only(backbone: ELSASwin) -> bool:
    return tuple(backbone.out_indices) == (len(backbone.num_features) - 1,)


def _used(backbone: ELSASwin, conversion: Conversion) -> dict[str, Tensor]:
    """Return the tensors except those of stages and norms that the backbone does not have."""
    tensors = dict(conversion.tensors)
    drop_unused_keys(tensors, "", backbone.out_indices, len(backbone.num_features))
    return tensors


def _whole_model(names: Mapping[str, Tensor], prefix: str, source: Source, to: str) -> str:
    """Return the conversion target if the model takes more than the backbone, the source's own
    family if the names match already, or "" for the backbone alone."""
    if to == DETECTRON2:
        if prefix != D2_BACKBONES.get(source.kind) or not _has_heads(names, source.kind, "d2"):
            return ""
        return DETECTRON2
    if prefix != "backbone." or source.kind == BACKBONE or source.family == SWIN:
        return ""
    if source.kind == CLASSIFIER:
        return "mmpretrain" if "head.fc.weight" in names else ""
    if source.family != DETECTRON2:
        return source.family
    if source.kind not in RULES or not _has_heads(names, source.kind, "mm"):
        return ""
    return "mmseg" if source.kind == UPERNET else "mmdet"


def _has_heads(names: Mapping[str, Tensor], kind: str, side: str) -> bool:
    parts = {getattr(rule, side).split(".")[0] for rule in RULES[kind]}
    return parts <= {name.split(".")[0] for name in names}


def _check_fit(
    path: str | os.PathLike,
    conversion: Conversion,
    given: Mapping[str, Tensor],
    names: Mapping[str, Tensor],
    prefix: str = "",
) -> None:
    """Raise UsageError unless the tensors match those under ``prefix``; output norms may differ."""
    absent = {prefix + name for name, _ in conversion.absent}
    wrong = [
        name
        for name in {**given, **{n: t for n, t in names.items() if n.startswith(prefix)}}
        if not name.startswith(f"{prefix}norm")
        and name not in absent
        and (name not in given or name not in names or given[name].shape != names[name].shape)
    ]
    if wrong:
        raise UsageError(
            f"{os.fspath(path)} has another backbone than the model: it is {conversion.source}, "
            f"and they differ in {len(wrong)} tensors, the first is {wrong[0]}"
        )
