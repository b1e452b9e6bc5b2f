"""The definition of the operator in plain PyTorch (arXiv 2112.12786, section 3)."""

import torch.nn.functional as F
from torch import Tensor


def elsa_attention_reference(
    value: Tensor,
    logits: Tensor,
    ghost_add: Tensor | None = None,
    ghost_mul: Tensor | None = None,
    *,
    kernel_size: int,
    dilation: int = 1,
) -> Tensor:
    """Enhanced local self-attention, offset by offset.

    ``out[c, p] = sum_o (ghost_mul[c, o] * attn[g, o, p] + ghost_add[c, o]) * value[c, p + o]``
    with ``attn`` the softmax of the logits over the K*K offsets of each head, c a channel of head
    g, and zeros outside of the map. Positions outside take part in the softmax.

    Args:
        value: [B, H, W, C], the channels head-major.
        logits: [B, H, W, G * K * K] before the softmax, head-major, then ky, then kx.
        ghost_add: [C, K, K] filters added to the attention, or None for none.
        ghost_mul: [C, K, K] filters that the attention is multiplied by, or None for 1 everywhere.
        kernel_size: K, odd.
        dilation: distance of neighbouring offsets in positions.

    Returns:
        [B, H, W, C].
    """
    height, width = value.shape[1:3]
    heads = logits.shape[-1] // kernel_size**2
    above, tops = windows(kernel_size, dilation, height)
    before, lefts = windows(kernel_size, dilation, width)
    attn = logits.unflatten(-1, (heads, -1)).softmax(-1)
    padded = F.pad(value, (0, 0, before, before, above, above)).unflatten(-1, (heads, -1))
    out = value.new_zeros(()).expand(value.shape).unflatten(-1, (heads, -1))
    for offset in range(kernel_size**2):
        ky, kx = divmod(offset, kernel_size)
        top, left = tops[ky], lefts[kx]
        window = padded[:, top : top + height, left : left + width]
        attended = attn[..., offset, None] * window
        if ghost_mul is not None:
            attended = attended * ghost_mul[:, ky, kx].unflatten(0, (heads, -1))
        out = out + attended
        if ghost_add is not None:
            out = out + ghost_add[:, ky, kx].unflatten(0, (heads, -1)) * window
    return out.flatten(-2)


def windows(kernel_size: int, dilation: int, length: int) -> tuple[int, list[int]]:
    """Return the padding at both ends of an axis, and the start of each offset's window in it."""
    radius = kernel_size // 2
    margin = radius * dilation
    if dilation > 1:  # not otherwise: in an exported graph the length may be a symbol
        # A window further away would read only zeros, too. Empty maps need a row for PyTorch 2.6.
        margin = min(margin, length + 1)
    starts = [(k - radius) * dilation for k in range(kernel_size)]
    return margin, [margin + max(-margin, min(start, margin)) for start in starts]
