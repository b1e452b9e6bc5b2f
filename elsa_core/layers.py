"""ELSA attention (arXiv 2112.12786, section 3) and Swin's (shifted-)window attention.

Every map is channels last, [B, H, W, C], on the way in and on the way out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import grouped_conv
from .linear import Linear, linear
from .operator import elsa_attention

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.7 and later


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution of a channels-last map, [B, H, W, C_in] -> [B, H, W, C_out].

    A linear layer whose weight keeps a convolution's shape, [C_out, C_in, 1, 1]; `forward` takes
    the options of `linear`.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, input: Tensor, **gelu: bool) -> Tensor:
        return linear(input, self.weight.flatten(1), self.bias, **gelu)


class ChannelsLastConv2d(nn.Conv2d):
    """Convolution of a channels-last map, [B, H, W, C_in] -> [B, H', W', C_out].

    With a ``factor`` like ``x``, of their product, in the form that `grouped_conv.use` chose; the
    kernel size must be odd, and padding keep the size of the map.
    """

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        if factor is not None:
            return grouped_conv.product_conv2d(x, factor, self.weight, self.bias, self.groups)
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def query_channels(dim: int, group_width: int) -> int:
    """Return the channels of ELSA's query and key: two thirds of ``dim``, rounded up to groups."""
    return -(-(dim // 3 * 2) // group_width) * group_width


class ELSA(nn.Module):
    """Enhanced local self-attention, [B, H, W, C] -> [B, H, W, C].

    A grouped KxK convolution of the Hadamard product of query and key gives each head's logits
    over the KxK neighbourhood; `elsa_attention` normalises them, combines them with the ghost
    filters and applies them to the value. ``lam`` and ``gamma`` as in `elsa_core.variants.Arch`,
    ``qkv_bias`` and ``qk_scale`` as in `VoloArch`.

    With ``attn_drop`` > 0, training uses a slower path that holds [B, H, W, C, K*K] values, because
    the fused operator never materialises the attention that the dropout acts on.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        group_width: int,
        lam: float = 0,
        gamma: float = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qkv_bias: bool = True,
        qk_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.qk_scale = qk_scale
        self.lam = lam
        self.gamma = gamma
        self.attn_drop = attn_drop
        dim_qk = query_channels(dim, group_width)
        groups = dim_qk // group_width
        self.split_sizes = (dim_qk, dim_qk, dim)
        self.pre_proj = PointwiseConv2d(dim, sum(self.split_sizes), bias=qkv_bias)
        self.attn = nn.Sequential(
            ChannelsLastConv2d(
                dim_qk, dim_qk, kernel_size, padding=kernel_size // 2, groups=groups
            ),
            nn.GELU(),
            PointwiseConv2d(dim_qk, kernel_size**2 * num_heads),
        )
        self.ghost_head = self._make_ghost_head(dim)
        self.reset_parameters()
        self.post_proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _make_ghost_head(self, dim: int) -> nn.Parameter | None:
        filters = bool(self.lam) + bool(self.gamma)
        if not filters:
            return None
        shape = (1, dim, self.kernel_size, self.kernel_size)
        return nn.Parameter(torch.empty(shape if filters == 1 else (2, *shape)))

    def reset_parameters(self) -> None:
        """Initialise the ghost filters; child layers have their own method."""
        add, mul = self._stored_filters()
        if mul is not None:
            nn.init.normal_(mul)
        if add is not None:
            nn.init.normal_(add, std=0.02)

    def _stored_filters(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the additive and multiplicative filters as parameters, each [C, K, K] or None."""
        if self.ghost_head is None:
            return None, None
        filters = self.ghost_head.reshape(-1, *self.ghost_head.shape[-3:])
        return (filters[-1] if self.gamma else None), (filters[0] if self.lam else None)

    def ghost_filters(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the effective additive and multiplicative filters, each [C, K, K] or None."""
        add, mul = self._stored_filters()
        if add is not None and self.gamma != 1:
            add = self.gamma * add
        if mul is not None and self.lam != 1:
            mul = mul ** int(self.lam)
        return add, mul

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.pre_proj(x).split(self.split_sizes, dim=-1)
        if self.qk_scale != 1:
            query = query * self.qk_scale
        convolution, _, pointwise = self.attn  # the GELU runs inside pointwise
        if isinstance(convolution, ChannelsLastConv2d) and grouped_conv.multiplies(
            query, key, convolution.weight
        ):
            logits = convolution(query, key)
        else:  # also of a user's layer that stands in for this one
            logits = convolution(query * key)
        logits = pointwise(logits, gelu_before=True)
        ghost_add, ghost_mul = self.ghost_filters()
        if self.training and self.attn_drop > 0:
            x = self._attend_with_dropout(value, logits, ghost_add, ghost_mul)
        else:
            x = elsa_attention(value, logits, ghost_add, ghost_mul, kernel_size=self.kernel_size)
        return self.proj_drop(self.post_proj(x))

    def _attend_with_dropout(
        self, value: Tensor, logits: Tensor, ghost_add: Tensor | None, ghost_mul: Tensor | None
    ) -> Tensor:
        attention = logits.unflatten(-1, (self.num_heads, 1, -1)).softmax(-1)
        weights = F.dropout(attention, self.attn_drop)
        if ghost_mul is not None:
            weights = weights * ghost_mul.flatten(1).unflatten(0, (self.num_heads, -1))
        if ghost_add is not None:
            weights = weights + ghost_add.flatten(1).unflatten(0, (self.num_heads, -1))
        patches = F.unfold(
            value.permute(0, 3, 1, 2), self.kernel_size, padding=self.kernel_size // 2
        )
        patches = patches.transpose(1, 2).unflatten(1, value.shape[1:3])
        patches = patches.unflatten(-1, (self.num_heads, -1, self.kernel_size**2))
        return (weights * patches).sum(-1).flatten(3)


class WindowAttention(nn.Module):
    """Swin's window attention, [B, H, W, C] -> [B, H, W, C], with cyclic ``shift`` if not 0.

    Maps are padded with zeros at the bottom and right to multiples of ``window_size``. The
    relative position bias ``rb`` is indexed by key minus query, row-major. Unless
    ``always_shift``, a map whose shorter side is not larger than ``window_size`` is not shifted.
    """

    relative_id: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int = 0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        always_shift: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        self.always_shift = always_shift
        self.attn_drop = attn_drop
        self.pre_proj = Linear(dim, 3 * dim)
        self.rb = nn.Parameter(torch.empty(num_heads, (2 * window_size - 1) ** 2))
        index = torch.empty(window_size**4, dtype=torch.long)
        self.register_buffer("relative_id", index, persistent=False)
        self.reset_parameters()
        self.post_proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """Initialise the position bias, and fill the buffer, which checkpoints do not have."""
        nn.init.normal_(self.rb, std=0.02)
        self.relative_id.copy_(relative_position_id(self.window_size))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        size, shift = self.window_size, self.shift
        if not self.always_shift:  # without a comparison, which would bind an exported program
            larger: Any = torch.sym_min(1, (torch.sym_min(height, width) - 1) // size)
            shift = larger * shift
        x = pad_to_multiple(x, size, first=1)
        if _is_exporting():
            x = self._attend_by_index(self.pre_proj(x), (height, width), shift)
            return self.proj_drop(self.post_proj(x))
        rows, columns = x.shape[1] // size, x.shape[2] // size
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
        # Windows and heads share an axis, so that the bias need not be repeated for each image.
        x = self.pre_proj(x).unflatten(-1, (3, self.num_heads, -1))
        x = x.unflatten(2, (columns, size)).unflatten(1, (rows, size))
        x = x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 4)
        value, query, key = x.unbind(0)
        x = self._attend(value, query, key, self._bias(rows, columns, shift))
        x = x.unflatten(2, (size, size)).unflatten(1, (rows, columns, self.num_heads))
        x = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
        if shift:
            x = x.roll((shift, shift), dims=(1, 2))
        return self.proj_drop(self.post_proj(x[:, :height, :width]))

    def _attend(self, value: Tensor, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        dropout = self.attn_drop if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)

    def _attend_by_index(self, x: Tensor, size: tuple[int, int], shift: int) -> Tensor:
        """Projections of a padded map, [B, H', W', 3C] -> [B, *size, C], for `torch.export`.

        A program serves the sizes for which each comparison of lengths has the same result. The
        tracer compares every dimension with 1, and a view with its base. Here no dimension is the
        number of windows, and the map is cropped by index, so that one window, or a map that needs
        no padding, is a size like others.
        """
        height, width = x.shape[1:3]
        window, heads, tokens = self.window_size, self.num_heads, height * width
        windows = tokens // window**2 * heads  # of all heads
        token = torch.arange(tokens, device=x.device)
        number, inside = token // window**2, token % window**2
        columns = width // window
        row = number // columns * window + inside // window
        column = number % columns * window + inside % window
        place = (row + shift) % height * width + (column + shift) % width

        head = torch.arange(heads, device=x.device)
        x = x.unflatten(3, (3 * heads, -1)).flatten(1, 3)
        source = (head[:, None] + place * (3 * heads)).flatten()
        value, query, key = (
            x.index_select(1, source + part * heads).unflatten(1, (windows, window**2))
            for part in range(3)
        )
        bias = self.rb[:, self.relative_id].reshape(heads, window**2, window**2)
        bias = bias.index_select(0, torch.arange(windows, device=x.device) * heads // windows)
        if self.shift:
            region = 3 * shift_region(row, height, window, shift)
            region = region + shift_region(column, width, window, shift)
            region = torch.cat([region] * heads).unflatten(0, (windows, window**2))
            apart = region[:, None, :] != region[:, :, None]
            bias = bias + -100.0 * apart.to(bias.dtype)
        x = self._attend(value, query, key, bias).flatten(1, 2)

        row, column = (torch.arange(length, device=x.device) for length in size)
        target = place.argsort().index_select(0, (row[:, None] * width + column).flatten())
        x = x.index_select(1, (target[:, None] + head * tokens).flatten())
        return x.unflatten(1, (*size, heads)).flatten(3)

    def _bias(self, rows: int, columns: int, shift: int) -> Tensor:
        """Position bias and shift mask, [rows * columns * heads, window**2, window**2]."""
        area = self.window_size**2
        bias = self.rb[:, self.relative_id].reshape(1, self.num_heads, area, area)
        if shift:
            mask = shift_mask(rows, columns, self.window_size, shift, self.rb.device)
            bias = bias + mask.to(bias.dtype).unsqueeze(1)
        return bias.expand(rows * columns, -1, -1, -1).flatten(0, 1)


class GlobalAttention(nn.Module):
    """Multi-head self-attention over all positions of a map, [B, H, W, C] -> [B, H, W, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return self.proj_drop(out).unflatten(1, x.shape[1:3])


def pad_to_multiple(x: Tensor, size: int, first: int) -> Tensor:
    """Pad the dimensions ``first`` and the next with zeros at the end to multiples of ``size``.

    The new lengths are ``size * n`` to compilers, too, which see that windows divide them.
    """
    height, width = ((n + size - 1) // size * size - n for n in x.shape[first : first + 2])
    return F.pad(x, (0, 0) * (x.dim() - first - 2) + (0, width, 0, height))


def relative_position_id(window_size: int) -> Tensor:
    """Return the index into ``rb`` of each (query, key) pair of a window: [window_size**4]."""
    span = torch.arange(window_size)
    rows, columns = span.repeat_interleave(window_size), span.repeat(window_size)
    delta_rows = rows[None, :] - rows[:, None] + window_size - 1
    delta_columns = columns[None, :] - columns[:, None] + window_size - 1
    return (delta_rows * (2 * window_size - 1) + delta_columns).flatten()


def shift_mask(
    rows: int, columns: int, window_size: int, shift: int, device: torch.device
) -> Tensor:
    """Return -100 between positions that are neighbours only by the cyclic shift, else 0.

    For ``rows`` x ``columns`` windows: [rows * columns, window_size**2, window_size**2].
    """

    def regions(windows: int) -> Tensor:
        length = windows * window_size
        position = torch.arange(length, device=device)
        return shift_region(position, length, window_size, shift).reshape(windows, window_size)

    region = 3 * regions(rows)[:, None, :, None] + regions(columns)[None, :, None, :]
    region = region.flatten(2).flatten(0, 1)
    return -100.0 * (region[:, None, :] != region[:, :, None]).float()


def shift_region(position: Tensor, length: int, window_size: int, shift: int) -> Tensor:
    """Return 0, 1 or 2 for each position of an axis: those that differ are no neighbours."""
    return (position >= length - window_size).long() + (position >= length - shift).long()
