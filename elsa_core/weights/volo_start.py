"""Use ImageNet weights of VOLO as a warm start for ELSA-VOLO.

All layers of VOLO (arXiv 2106.13112 and its code) but the outlook attention of its first stage are
ELSA-VOLO's, and outlook attention has ELSA's projections of value and output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

from elsa_core.runtime.errors import UsageError

from .source import BACKBONE, CLASSIFIER, VOLO, Source
from .tables import Shapes
from .volo import CLASS_PARTS, LOCAL, Volo, is_warm_start, read_volo, tops_of

_OUTLOOK = "ELSA replaces outlook attention"


def is_volo(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a VOLO's, or a warm start made of one."""
    named = {_our_name(name) for name in tensors}
    if not any(name.startswith("network.0.") for name in named):
        return False
    return not any(".attn.pre_proj." in n for n in named) or is_warm_start(named)


def _our_name(name: str) -> str:
    name = name.removeprefix("backbone.").removeprefix("bottom_up.")
    return re.sub(r"^head\.(fc|aux_fc)\.", lambda m: f"{'aux_' * ('aux' in m[1])}head.", name)


def recognise_volo(tensors: dict[str, Tensor]) -> Source:
    """Return a `Source` whose tensors have ELSA-VOLO's names.

    The rows of the values in ``pre_proj`` have the name ``v`` that they have in VOLO.

    Raises:
        UsageError: the tensors are not those of an ImageNet classifier.
    """
    if tops_of(tensors) & {
        "neck",
        "roi_head",
        "roi_heads",
        "decode_head",
        "sem_seg_head",
        "bbox_head",
    }:
        raise UsageError(
            "it holds a detector or segmentor with a stock VOLO: of VOLO, only ImageNet "
            "checkpoints can be used"
        )
    named = {_our_name(name): (name, tensor) for name, tensor in tensors.items()}
    volo = read_volo({name: tensor for name, (_, tensor) in named.items()})
    taken: dict[str, tuple[str, Tensor]] = {}
    dropped: list[tuple[str, str]] = []
    for name, (old, tensor) in named.items():
        new = re.sub(r"^(network\.0\.\d+\.attn\.)proj\.", r"\1post_proj.", name)
        if LOCAL.match(name) and ".attn.attn." in name:
            dropped.append((old, _OUTLOOK))
        elif LOCAL.match(name) and ".pre_proj." in name:
            dim = volo.arch.embed_dims[0]
            taken[new.replace(".pre_proj.", ".v.")] = (old, tensor[-dim:].flatten(1))
        else:
            taken[new] = (old, tensor)
    kind = CLASSIFIER if tops_of(taken) & set(CLASS_PARTS) else BACKBONE
    return Source(VOLO, kind, volo, taken, dropped)


def warm_shapes(shapes: Shapes, volo: Volo) -> tuple[Shapes, list[str]]:
    """Return a backbone's shapes with VOLO's ``v`` in place of what VOLO lacks, and the latter."""
    dim = volo.arch.embed_dims[0]
    kept, absent = {}, []
    for name, shape in shapes.items():
        if not LOCAL.match(name) or ".post_proj." in name:
            kept[name] = shape
        elif ".pre_proj." in name:
            kept[name.replace(".pre_proj.", ".v.")] = (dim, *shape[1:2])
        else:
            absent.append(name)
    return kept, absent


def complete(values: Tensor, rows: int, block: int) -> Tensor:
    """Return ``pre_proj``'s weight or bias of a block with VOLO's of the ``values`` as last rows.

    The ``rows`` of query and key before them are drawn as PyTorch initialises convolutions; they
    are the same each time for the same block.
    """
    generator = torch.Generator().manual_seed(block)
    new = 2 * torch.rand(rows, *values.shape[1:], generator=generator) - 1
    whole = torch.cat([(new / sqrt(len(values))).to(values.dtype), values])
    return whole[..., None, None] if values.dim() == 2 else whole


def merge(name: str, values: Tensor, own: Tensor) -> Tensor:
    """Return the tensor ``own`` of a model with ``values`` as its last rows.

    One without memory for its elements is completed as in a file.
    """
    rows = len(own) - len(values)
    if own.is_meta:
        return complete(values, rows, block_of(name))
    return torch.cat([own[:rows].detach().cpu(), values.reshape(-1, *own.shape[1:]).to(own.dtype)])


def block_of(name: str) -> int:
    """Return the index of the block in the name of its attention."""
    return int(name.split(".attn.")[0].rsplit(".", 1)[1])
