"""Convert checkpoint files, or load them straight into a model of another framework."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from elsa_core import ELSASwin, ELSAVolo
from elsa_core.backbone import StagedBackbone
from elsa_core.checkpoint import drop_unused_keys
from elsa_core.runtime.errors import UsageError
from elsa_core.volo import drop_unused_parts

from . import averages, write
from .channels import fit_channels
from .convert import SEEDED_IN_MODEL, Conversion, convert
from .fit import backbones_of, fit_positions
from .names import D2_BACKBONES, RULES, UPERNET
from .read import read_checkpoint
from .recognise import recognise
from .source import BACKBONE, CLASSIFIER, DETECTRON2, OPENMMLAB, SWIN, Source
from .tables import OPTIONAL_LEAF
from .volo import CLASS_PARTS, HEADS, OUTPUTS, Volo, tops_of
from .volo_start import merge

logger = logging.getLogger(__name__)


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


def load_backbone(backbone: StagedBackbone, path: str | os.PathLike) -> Conversion:
    """Load the backbone weights of any convertible checkpoint into an `elsa_core.ELSASwin` or an
    `elsa_core.ELSAVolo`.

    A backbone that returns only the last stage's map counts as a classifier's: it also gets the
    final norm of a classifier's checkpoint. An `elsa_core.ELSAVoloTokens` gets all that a
    classifier has before its heads, and an `elsa_core.ELSAVoloClassifier` heads of as many classes.

    Raises:
        UsageError: as in `convert_file`, or if the checkpoint's backbone has another architecture;
            nothing is loaded.
    """
    source = read_source(path)
    _log_choice(path, source)
    _warn_of_heads(backbone, source)
    names = backbone.state_dict()
    with naming(path):
        conversion = convert(source, "backbone", keep=_kept_parts(backbone, names))
    tensors = _used(backbone, conversion, names)
    conversion.spread = fit_channels(backbone, tensors, os.fspath(path))
    _check_fit(path, conversion, tensors, names)
    backbone.load_state_dict(tensors, strict=False)
    return conversion


def checkpoint_for(
    model: nn.Module,
    path: str | os.PathLike,
    content: Any = None,
    *,
    to: str = DETECTRON2,
    anchor_sizes: int | None = None,
    begins: bool = True,
) -> dict[str, Any]:
    """Return a checkpoint of any framework as a dict for a Detectron2 or OpenMMLab model.

    ``model`` has the tensors under the model's names, ``meta`` the checkpoint's metadata. A
    checkpoint of another kind of model gives only its backbone, and no ``meta``.

    Args:
        content: content of the file if it has been read already.
        to: framework of the model, "detectron2" or "openmmlab".
        anchor_sizes: as in `convert`.
        begins: as in `fit_channels`.

    Raises:
        UsageError: as in `load_backbone`, or if the model does not have exactly one backbone.
    """
    names = model.state_dict()
    found = backbones_of(model)
    if len(found) != 1:
        raise UsageError(
            f"{os.fspath(path)} needs a model with one ELSA-Swin or ELSA-VOLO, got {len(found)}"
        )
    prefix, backbone = found[0]
    inside = {n.removeprefix(prefix): t for n, t in names.items() if n.startswith(prefix)}
    checkpoint = read_checkpoint(path) if content is None else content
    with naming(path):
        source = recognise(checkpoint)
    _log_choice(path, source)
    _warn_of_heads(backbone, source)
    if target := _whole_model(names, prefix, source, to):
        if target != source.family or source.kind == CLASSIFIER:
            with naming(path):
                conversion = convert(source, target, anchor_sizes=anchor_sizes)
            tensors = _seeded(conversion, names)
        elif to == DETECTRON2:
            tensors = dict(source.tensors.values())
        else:
            tensors = {name: tensor for name, (_, tensor) in source.tensors.items()}
        fit_positions(model, tensors)
        fit_channels(model, tensors, os.fspath(path), begins=begins)
        return {"model": tensors, "meta": source.meta}
    keep = _kept_parts(backbone, inside) if to == OPENMMLAB else ()
    with naming(path):
        conversion = convert(source, "backbone", keep=keep)
    tensors = _used(backbone, conversion, inside)
    fit_channels(backbone, tensors, os.fspath(path), begins=begins)
    _check_fit(path, conversion, tensors, inside)
    return {"model": {prefix + name: tensor for name, tensor in tensors.items()}}


def _kept_parts(backbone: StagedBackbone, names: Collection[str]) -> set[str]:
    """Return the parts of a classifier that the backbone takes."""
    last = len(backbone.num_features) - 1
    kept = tops_of(names) & set(CLASS_PARTS)
    alone = tuple(backbone.out_indices) == (last,) and f"norm{last}.weight" in names
    if alone and not getattr(backbone, "pyramid", False):
        kept.add(f"norm{last}")
    return kept


_NO_OUTPUT = "of an output that the checkpoint does not have"


def _used(
    backbone: StagedBackbone, conversion: Conversion, names: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors for a backbone with the tensors ``names``, except those of parts that it
    does not have, which are noted."""
    tensors = _seeded(conversion, names)
    if isinstance(backbone, ELSASwin):
        drop_unused_keys(tensors, "", backbone.out_indices, len(backbone.num_features))
        return tensors
    volo = conversion.source.backbone
    if not isinstance(backbone, ELSAVolo) or not isinstance(volo, Volo):
        return tensors
    reasons = {}
    for name, tensor in tensors.items():
        top, wanted = name.split(".")[0], names.get(name)
        if OUTPUTS.match(name) and volo.pyramid not in (None, backbone.pyramid):
            reasons[top] = "the model's outputs are made in another way, with or without a pyramid"
        elif top in HEADS and wanted is not None and wanted.shape != tensor.shape:
            reasons[top] = "the model has another number of classes"
    for name in [name for name in tensors if name.split(".")[0] in reasons]:
        del tensors[name]
        reason = reasons[name.split(".")[0]]
        conversion.dropped.append((conversion.moved.pop(name), reason))
    tops = tops_of(names)
    conversion.absent = [entry for entry in conversion.absent if entry[0].split(".")[0] in tops]
    noted = {name for name, _ in conversion.absent} | tops_of(tensors)
    outputs = tops_of([name for name in names if OUTPUTS.match(name)])
    conversion.absent += [(top, _NO_OUTPUT) for top in sorted(outputs - noted)]
    drop_unused_parts(backbone, tensors)
    fit_positions(backbone, tensors)
    return tensors


def _log_choice(path: str | os.PathLike, source: Source) -> None:
    if source.has_both:
        logger.warning(averages.note(os.fspath(path), averaged=source.ema))


def _warn_of_heads(backbone: StagedBackbone, source: Source) -> None:
    """Log where the heads of a model are not those that the sizes of its checkpoint stand for."""
    volo = source.backbone
    if not isinstance(backbone, ELSAVolo) or not isinstance(volo, Volo) or volo.unknown_heads:
        return
    ours, theirs = tuple(backbone.arch.num_heads), tuple(volo.arch.num_heads)
    if backbone.arch.embed_dims == volo.arch.embed_dims and ours != theirs:
        logger.warning(
            f"the model has {ours} heads, and VOLO of these sizes {theirs}: the results depend on "
            "them, and the tensors of a checkpoint do not tell"
        )


def _seeded(conversion: Conversion, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the model's own rows where SRC has only the others."""
    tensors = dict(conversion.tensors)
    for name, values in conversion.seeds.items():
        own = names.get(name)
        if own is not None and own.shape[1:2] == values.shape[1:2] and len(own) >= len(values):
            tensors[name] = merge(name, values, own)
            conversion.seeded = SEEDED_IN_MODEL
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
        heads = "head.fc.weight" in names and "head.weight" in source.tensors
        return "mmpretrain" if heads else ""
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
) -> None:
    """Raise UsageError unless the tensors match those of a backbone; outputs may differ."""
    absent = {name for name, _ in conversion.absent}

    def differs(name: str) -> bool:
        if OUTPUTS.match(name) or name in absent:
            return False
        if name not in given:
            # Of a classifier's parts, the conversion has checked those that the file has.
            return not (name.split(".")[0] in CLASS_PARTS or name.endswith(OPTIONAL_LEAF))
        return name not in names or given[name].shape != names[name].shape

    if wrong := [name for name in {**given, **names} if differs(name)]:
        raise UsageError(
            f"{os.fspath(path)} has another backbone than the model: it is {conversion.source}, "
            f"and they differ in {len(wrong)} tensors, the first is {wrong[0]}"
        )
