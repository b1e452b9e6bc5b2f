"""Parameter names in original ELSA-Swin checkpoints."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, MutableMapping
from typing import Any

logger = logging.getLogger(__name__)
# Buffers that the original stores although they follow from the architecture.
_BOOKKEEPING = re.compile(r"layers\.\d+\.blocks\.\d+\.(attn\.relative_id|attn_mask)")
_OUTPUT_NORM = re.compile(r"norm(\d+)\.(weight|bias)")
_STAGE = re.compile(r"layers\.(\d+)\.(downsample\.)?.*")


def drop_unused_keys(
    state_dict: MutableMapping[str, Any],
    prefix: str,
    out_indices: Collection[int],
    num_stages: int,
) -> None:
    """Remove, in place, tensors that the backbone under ``prefix`` does not use.

    These are the original's bookkeeping buffers, the output norms of stages that are not in
    ``out_indices``, and all layers after the last of these: a published backbone loads strictly
    into one with fewer outputs. All other keys stay, so that strict loading still reports them.
    """
    last = max(out_indices)
    unused_norms = set(range(num_stages)) - set(out_indices)
    not_built = 0
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        norm, stage = _OUTPUT_NORM.fullmatch(name), _STAGE.fullmatch(name)
        # The downsampling before a stage is removed with it.
        after = stage is not None and last < int(stage[1]) + bool(stage[2]) < num_stages
        if _BOOKKEEPING.fullmatch(name) or (norm and int(norm[1]) in unused_norms) or after:
            del state_dict[key]
            not_built += after
    if not_built:
        logger.warning(
            f"{not_built} tensors of a checkpoint are not used: they come after stage {last} of "
            f"the backbone, the last one that it returns (0..{num_stages - 1} exist)"
        )
