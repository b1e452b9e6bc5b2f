"""Count FLOPs as papers on backbones do, without allocating or computing tensors.

One FLOP is a multiply-add in a convolution, a linear layer or a matrix product; normalisation,
activations and resizing do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from . import operator as _registers_the_operator  # noqa: F401
from .flop_handles import attention, grouped_conv


def count_flops(run: Callable[[Tensor], Any], size: tuple[int, int]) -> int:
    """Count the multiply-adds of ``run`` with one image [1, 3, H, W].

    Args:
        size: (H, W) in pixels.

    Raises:
        NotImplementedError: an operator of this package has no formula.
    """
    with _counting() as counter:
        run(torch.empty(1, 3, *size))
    return counter.get_total_flops() // 2


def count_flops_by_module(
    model: nn.Module, run: Callable[[Tensor], Any], size: tuple[int, int]
) -> dict[str, int]:
    """Count as `count_flops`, for each module of ``model`` by name.

    The number of a module does not include its children. The name "" stands for ``model`` itself
    and for operations outside all its modules.
    """

    class Root(nn.Module):  # the counter's names begin at the outermost module that is called
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Tensor) -> None:
            run(image)

    with _counting() as counter:
        Root()(torch.empty(1, 3, *size))
    counts = counter.get_flop_counts()
    totals = {name: sum(counts[name].values()) for name in counts if name != "Global"}
    own: Counter[str] = Counter()
    for name, total in totals.items():
        own[_in_model(name)] += total
        while name := name.rpartition(".")[0]:
            if name in totals:  # the nearest that was called has counted it, too
                own[_in_model(name)] -= total
                break
    return {name: twice // 2 for name, twice in own.items() if twice}


def _in_model(name: str) -> str:
    return name.removeprefix("Root").removeprefix(".model").removeprefix(".")


def _counted_attention(
    value: torch.Size,
    logits: torch.Size,
    ghost_add: torch.Size | None,
    ghost_mul: torch.Size | None,
    kernel_size: int,
    dilation: int,
    **_: Any,
) -> int:
    """Twice the multiply-adds, as PyTorch counts."""
    return 2 * attention(value, kernel_size, ghost_add is not None or ghost_mul is not None)


def _counted_convolution(
    query: torch.Size, key: torch.Size, weight: torch.Size, *_: Any, **__: Any
) -> int:
    """Twice the multiply-adds, as PyTorch counts."""
    return 2 * grouped_conv(query, weight)


_FORMULAS = {
    torch.ops.elsa.attention: _counted_attention,
    torch.ops.elsa.grouped_conv: _counted_convolution,
}


class _RefuseUnknown(TorchDispatchMode):
    """Refuses operators of this package that have no formula."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "elsa" and func.overloadpacket not in _FORMULAS:
            raise NotImplementedError(f"elsa_core/flops.py has no formula for {func}")
        return func(*args, **(kwargs or {}))


class _KnownShapes(TorchFunctionMode):
    """Computes shapes that are tensors, by whose values deformable attention splits its maps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._shape_as_tensor:
            with unset_fake_temporarily():
                return torch.tensor(args[0].shape)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(t, FakeTensor) or t.is_floating_point() for t in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    # Models may hold real tensors, too.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.no_grad(), counter, _RefuseUnknown(), _KnownShapes():
        yield counter
