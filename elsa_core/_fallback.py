"""Default kernels of the operator in plain PyTorch, for devices without other ones.

Both loop over the K*K offsets with buffers of the size of ``value``. Autograd does not trace them,
so that nothing of size C*K*K is ever held. All sums of 16-bit types are float32, as in the compiled
kernels, and results are rounded once.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._problem import check_problem
from .reference import windows


def attention(
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None,
    ghost_mul: Tensor | None,
    kernel_size: int,
    dilation: int,
) -> Tensor:
    """``elsa::attention``; see ``elsa_attention``. Two kernel launches for each offset."""
    check_problem(value, logits, ghost_add, ghost_mul, kernel_size, dilation)
    call = _Call(value, logits, ghost_add, ghost_mul, kernel_size, dilation)
    out = call.attention.new_zeros(call.shape)
    for offset, place, add, mul in call.offsets():
        out.addcmul_(_weight(call.attention[..., offset, None], add, mul), call.padded[place])
    return out.flatten(-2).to(value.dtype)


def attention_backward(
    grad: Tensor,
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None,
    ghost_mul: Tensor | None,
    kernel_size: int,
    dilation: int,
    ghost_gradients: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``elsa::attention_backward``: gradients of value, logits, ghost_add and ghost_mul.

    The gradient of a ghost filter that is None is empty; without ``ghost_gradients``, both are.
    """
    check_problem(value, logits, ghost_add, ghost_mul, kernel_size, dilation, grad=grad)
    call = _Call(value, logits, ghost_add, ghost_mul, kernel_size, dilation)
    grad = grad.to(call.padded.dtype).unflatten(-1, call.shape[3:])
    grad_attention = torch.zeros_like(call.attention)
    grad_padded = torch.zeros_like(call.padded)
    grad_add, grad_mul = (
        torch.empty_like(ghost, memory_format=torch.contiguous_format)
        if ghost is not None and ghost_gradients
        else value.new_empty(0)
        for ghost in (ghost_add, ghost_mul)
    )
    for offset, place, add, mul in call.offsets():
        attention = call.attention[..., offset, None]
        product = grad * call.padded[place]
        if grad_add.numel():
            grad_add.flatten(1)[:, offset] = product.sum((0, 1, 2)).flatten()
        if grad_mul.numel():
            grad_mul.flatten(1)[:, offset] = (product * attention).sum((0, 1, 2)).flatten()
        grad_attention[..., offset] = (product if mul is None else product * mul).sum(-1)
        grad_padded[place].addcmul_(grad, _weight(attention, add, mul))
    dot = (call.attention * grad_attention).sum(-1, keepdim=True)
    grad_logits = call.attention * (grad_attention - dot)
    grad_value = grad_padded[call.map].flatten(-2)
    return (
        torch.empty_like(value, memory_format=torch.contiguous_format).copy_(grad_value),
        grad_logits.flatten(-2).to(value.dtype),
        grad_add,
        grad_mul,
    )


class _Call:
    """The operands of a call in the type of its sums.

    Attributes:
        shape: (B, H, W, G, C / G) of the values and results.
        attention: [B, H, W, G, K*K].
        padded: the value with zeros around it, [B, H + ..., W + ..., G, C / G].
        map: place of the map in ``padded``.
    """

    def __init__(
        self,
        value: Tensor,
        logits: Tensor,
        ghost_add: Tensor | None,
        ghost_mul: Tensor | None,
        kernel_size: int,
        dilation: int,
    ) -> None:
        dtype = torch.promote_types(value.dtype, torch.float32)
        heads = logits.shape[-1] // kernel_size**2
        height, width, channels = value.shape[1:]
        above, self._tops = windows(kernel_size, dilation, height)
        before, self._lefts = windows(kernel_size, dilation, width)
        self.shape = (*value.shape[:3], heads, channels // heads)
        self.map = self._place(above, before)
        self.attention = logits.unflatten(-1, (heads, -1)).softmax(-1, dtype=dtype)
        padded = F.pad(value, (0, 0, before, before, above, above))
        self.padded = padded.to(dtype).unflatten(-1, (heads, -1))
        self._ghosts = [
            None if ghost is None else ghost.to(dtype).reshape(*self.shape[3:], -1)
            for ghost in (ghost_add, ghost_mul)
        ]

    def _place(self, top: int, left: int) -> tuple[slice, slice, slice]:
        height, width = self.shape[1:3]
        return slice(None), slice(top, top + height), slice(left, left + width)

    def offsets(self) -> Iterator[tuple[int, tuple[slice, ...], Tensor | None, Tensor | None]]:
        """Yield each offset's index, place in ``padded`` and filters [G, C / G] or None."""
        for offset in range(len(self._tops) ** 2):
            ky, kx = divmod(offset, len(self._tops))
            add, mul = (None if ghost is None else ghost[..., offset] for ghost in self._ghosts)
            yield offset, self._place(self._tops[ky], self._lefts[kx]), add, mul


def _weight(attention: Tensor, add: Tensor | None, mul: Tensor | None) -> Tensor:
    """Return mul * attention + add."""
    if mul is None:
        return attention if add is None else attention + add
    return attention * mul if add is None else torch.addcmul(add, attention, mul)
