"""Grouped convolution of the product of two maps, which makes ELSA's logits, in several forms.

- `auto`, the default: `cuda` where its kernels serve, else `torch`. On an H200, `cuda` was the
  fastest form in bfloat16 at every size that was measured, by 2.9 to 6.4 times.
- `torch`: PyTorch's grouped convolution. On CPUs it is the fastest form.
- `dense`: the same with fewer and wider groups, and zeros between those of the weight. On an H200
  it was faster than `torch` in float32, by TF32, and many times slower at a size in bfloat16.
- `cuda`: the operator ``elsa::grouped_conv``, CUDA kernels for float16 and bfloat16 that multiply
  query and key as they read them. They serve a kernel size of 7, groups of 4 or 8 channels,
  multiples of 8 channels, and devices of compute capability 8.0 or later; all else goes to `torch`.
  They are differentiable once, in reverse mode. By name it is an error that there are none.

All compute the same from the same parameters. Choose by the environment variable ELSA_CONVOLUTION
or by `use`.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from ._grouped_conv import has_cuda_kernels, is_served

__all__ = ["CHOICES", "chosen", "dense_weight", "multiplies", "product_conv2d", "use"]

CHOICES = ("auto", "torch", "dense", "cuda")
VARIABLE = "ELSA_CONVOLUTION"
DENSE_CHANNELS = 64
"""Least channels of a dense block: the narrowest tile in which tensor cores are fully used.

Each channel is multiplied by all others of its block, so that wider ones cost as much more.
"""


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}, got {name!r}")
    if name == "cuda" and not has_cuda_kernels():
        raise RuntimeError(
            f"{source} is 'cuda', but this installation has no CUDA kernels for devices of compute "
            "capability 8.0 or later: build it with FORCE_CUDA=1, or choose auto, torch or dense"
        )
    return name


def _has_operator(name: str) -> bool:
    """Whether the form of that name calls the operator where its kernels serve."""
    return name == "cuda" or name == "auto" and has_cuda_kernels()


try:
    _chosen = _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)
except (ValueError, RuntimeError) as error:
    raise ImportError(str(error)) from error
_operator = _has_operator(_chosen)


def chosen() -> str:
    """Return the form in use, one of `CHOICES`."""
    return _chosen


def use(name: str) -> AbstractContextManager[object]:
    """Choose the form for the whole process, or for a ``with`` block.

    ``use("dense")`` lasts until the next call; ``with use("dense"):`` restores the previous choice
    at the end of the block. Keep the choice until the backward pass where activations are
    recomputed.

    Raises:
        ValueError: an unknown name.
        RuntimeError: there are no kernels for `cuda`.
    """
    restore = ExitStack()
    restore.callback(_choose, _chosen)
    _choose(name)
    return restore


def _choose(name: str) -> None:
    global _chosen, _operator
    _chosen = _checked(name, "the form of the grouped convolution")
    _operator = _has_operator(name)


def multiplies(query: Tensor, key: Tensor, weight: Tensor) -> bool:
    """Whether the form in use has more to gain from two maps than from their product."""
    return _chosen == "dense" or _operator and is_served(query, key, weight)


def product_conv2d(
    query: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> Tensor:
    """Convolve ``query * key``, [B, H, W, C] each, in the chosen form: [B, H, W, C].

    A product that is infinite or NaN makes NaN not only in its group, but also in the groups that
    share a block with it: in `dense` of DENSE_CHANNELS channels, in `cuda`, also as `auto`, of 8.

    Args:
        weight: [C, C / groups, K, K], K odd; the maps are padded with zeros to keep their size.
        bias: [C], or None for none.
    """
    if _operator and is_served(query, key, weight):
        return torch.ops.elsa.grouped_conv(query, key, weight, bias)
    if _chosen == "dense":
        groups_per_block = _groups_per_block(groups, weight.shape[1])
        weight = dense_weight(weight, groups, groups_per_block)
        groups //= groups_per_block
    x = (query * key).permute(0, 3, 1, 2)
    padding = weight.shape[-1] // 2
    return F.conv2d(x, weight, bias, padding=padding, groups=groups).permute(0, 2, 3, 1)


def dense_weight(weight: Tensor, groups: int, groups_per_block: int) -> Tensor:
    """Return the weight of the same convolution with ``groups / groups_per_block`` groups.

    [C, width, K, K] -> [C, groups_per_block * width, K, K] in channels-last memory, with zeros
    where a channel is of another group.
    """
    blocks = groups // groups_per_block
    weight = weight.unflatten(0, (blocks, groups_per_block, -1)).permute(0, 2, 4, 5, 3, 1)
    weight = torch.diag_embed(weight, dim1=1, dim2=5)  # [blocks, group, out, K, K, group, in]
    return weight.flatten(5, 6).flatten(0, 2).permute(0, 3, 1, 2)


def _groups_per_block(groups: int, width: int) -> int:
    """The fewest groups that fill blocks of the same size with at least DENSE_CHANNELS channels."""
    sizes = [n for n in range(1, groups) if groups % n == 0 and n * width >= DENSE_CHANNELS]
    return min(sizes, default=groups)
