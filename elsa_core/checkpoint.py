"""What is known of the parameter names in original ELSA-Swin checkpoints."""

from __future__ import annotations

import re
from collections.abc import Collection, MutableMapping
from typing import Any

# Buffers that the original stores although they follow from the architecture.
_BOOKKEEPING = re.compile(r"layers\.\d+\.blocks\.\d+\.(attn\.relative_id|attn_mask)")
_OUTPUT_NORM = re.compile(r"norm(\d+)\.(weight|bias)")


def drop_unused_keys(
    state_dict: MutableMapping[str, Any],
    prefix: str,
    out_indices: Collection[int],
    num_stages: int,
) -> None:
    """Removes, in place, what the backbone under ``prefix`` has no use for.

    That is the original's bookkeeping buffers, and the output norms of stages that exist but are
    not among ``out_indices``: a published backbone has all norms and loads strictly into one with
    fewer outputs. Every other key stays, so that strict loading still reports it.
    """
    unused_norms = set(range(num_stages)) - set(out_indices)
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        norm = _OUTPUT_NORM.fullmatch(name)
        if _BOOKKEEPING.fullmatch(name) or (norm and int(norm[1]) in unused_norms):
            del state_dict[key]
