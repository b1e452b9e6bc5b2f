"""Default kernels of the operator in plain PyTorch, for devices without a compiled one.

Both loop over the K*K offsets with buffers of the size of ``value``. Autograd does not trace them,
so that nothing of size C*K*K is ever held.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._problem import check_problem
from .reference import elsa_attention_reference, windows


def attention(
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None,
    ghost_mul: Tensor | None,
    kernel_size: int,
    dilation: int,
) -> Tensor:
    """``elsa::attention``; see ``elsa_attention``."""
    check_problem(value, logits, ghost_add, ghost_mul, kernel_size, dilation)
    return elsa_attention_reference(
        value, logits, ghost_add, ghost_mul, kernel_size=kernel_size, dilation=dilation
    )


def attention_backward(
    grad: Tensor,
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None,
    ghost_mul: Tensor | None,
    kernel_size: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``elsa::attention_backward``: gradients of value, logits, ghost_add and ghost_mul.

    The gradient of a ghost filter that is None is empty.
    """
    check_problem(value, logits, ghost_add, ghost_mul, kernel_size, dilation, grad=grad)
    height, width = value.shape[1:3]
    heads = logits.shape[-1] // kernel_size**2
    above, tops = windows(kernel_size, dilation, height)
    before, lefts = windows(kernel_size, dilation, width)
    attn = logits.unflatten(-1, (heads, -1)).softmax(-1)
    padded = F.pad(value, (0, 0, before, before, above, above)).unflatten(-1, (heads, -1))
    grad = grad.unflatten(-1, (heads, -1))
    grad_padded = torch.zeros_like(padded)
    grad_attn = torch.zeros_like(attn)
    grad_add = value.new_empty(0) if ghost_add is None else torch.empty_like(ghost_add)
    grad_mul = value.new_empty(0) if ghost_mul is None else torch.empty_like(ghost_mul)
    for offset in range(kernel_size**2):
        ky, kx = divmod(offset, kernel_size)
        top, left = tops[ky], lefts[kx]
        window = padded[:, top : top + height, left : left + width]
        product = grad * window
        weight = attn[..., offset, None]
        if ghost_add is not None:
            grad_add[:, ky, kx] = product.sum((0, 1, 2)).flatten()
        if ghost_mul is not None:
            mul = ghost_mul[:, ky, kx].unflatten(0, (heads, -1))
            grad_mul[:, ky, kx] = (product * weight).sum((0, 1, 2)).flatten()
            product, weight = product * mul, weight * mul
        if ghost_add is not None:
            weight = weight + ghost_add[:, ky, kx].unflatten(0, (heads, -1))
        grad_attn[..., offset] = product.sum(-1)
        grad_padded[:, top : top + height, left : left + width] += grad * weight
    grad_logits = attn * (grad_attn - (attn * grad_attn).sum(-1, keepdim=True))
    grad_value = grad_padded[:, above : above + height, before : before + width]
    return grad_value.flatten(-2).contiguous(), grad_logits.flatten(-2), grad_add, grad_mul
