"""Operations of a model, in all or for each of its modules, counted without arithmetic.

An operation is a multiply-add in a convolution, a linear layer or a matrix product, as papers on
backbones count "FLOPs"; normalisation, activations and resizing are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from . import operator as _registers_the_operator  # noqa: F401
from .flops import attention


def operations(run: Callable[[Tensor], Any], size: tuple[int, int]) -> int:
    """Of ``run`` with one image [1, 3, H, W] of ``size``, which is (H, W) in pixels.

    Raises NotImplementedError for an operator of ours that has no formula.
    """
    with _counting() as counter:
        run(torch.empty(1, 3, *size))
    return counter.get_total_flops() // 2


def operations_by_module(
    model: nn.Module, run: Callable[[Tensor], Any], size: tuple[int, int]
) -> dict[str, int]:
    """As `operations`, for each module of ``model`` by its name.

    A module's number is its own: those of its children are theirs. The name "" stands for ``model``
    itself and for what happens outside of all its modules.
    """
    own: Counter[str] = Counter()
    running = [""]
    last = 0

    def settle(counter: FlopCounterMode) -> None:
        nonlocal last
        total = counter.get_total_flops()
        own[running[-1]] += total - last
        last = total

    with _counting() as counter:

        def enter(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                settle(counter)
                running.append(name)

            return hook

        def leave(*_: Any) -> None:
            settle(counter)
            running.pop()

        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave))
        try:
            run(torch.empty(1, 3, *size))
            settle(counter)
        finally:
            for handle in handles:
                handle.remove()
    return {name: twice // 2 for name, twice in own.items() if twice}


def _attention_operations(
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


_FORMULAS = {torch.ops.elsa.attention: _attention_operations}


class _RefuseUnknown(TorchDispatchMode):
    """No operator of ours is left out unnoticed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "elsa" and func.overloadpacket not in _FORMULAS:
            raise NotImplementedError(f"elsa_core/operations.py has no formula for {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    # Of models on real tensors too, so that any model can be counted.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), counter, _RefuseUnknown():
        yield counter
