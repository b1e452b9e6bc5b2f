"""ELSA-Swin, and what both families share, in standard ONNX operators for images of any size.

What `elsa_core` computes, written a second time as a graph: tracing the backbone with symbolic
sizes takes minutes, writing it takes a second. Each export compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnxscript import opset20 as op
from torch import Tensor, nn

from elsa_core.blocks import PatchEmbed, PatchMerging
from elsa_core.layers import ELSA, WindowAttention

# An end of a Slice that lies behind every map's.
_END = 2**63 - 1
# Neighbours in a row whose weighted sums are one product of matrices.
_RUN = 16
# A value of the graph; onnxscript's classes for it differ with the tool that records.
Value = Any


def backbone(module: Any, image: Value) -> list[Value]:
    """`ELSASwin.forward` in evaluation: [B, C, H, W] -> [B, C_i, H_i, W_i] of each output."""
    x = _patch_embed(module.patch_embed, image)
    outputs = []
    for index, stage in enumerate(module.layers):
        for block in stage.blocks:
            x = residual_block(block, x, _window_attention)
        if index in module.out_indices:
            out = layer_norm(getattr(module, f"norm{index}"), x)
            outputs.append(op.Transpose(out, perm=[0, 3, 1, 2]))
        if index == module.out_indices[-1]:
            break
        x = _patch_merging(stage.downsample, x)
    return outputs


def elsa_attention(
    value: Value,
    logits: Value,
    ghost_add: Value | None,
    ghost_mul: Value | None,
    *,
    channels: int,
    heads: int,
    kernel_size: int,
) -> Value:
    """`elsa_core.elsa_attention`; the additive filters are a depthwise convolution."""
    attention = op.Softmax(op.Reshape(logits, ints(0, 0, 0, heads, kernel_size**2)), axis=-1)
    if ghost_mul is None:
        out = _by_rows(value, attention, heads, channels // heads, kernel_size)
    else:
        out = _by_offsets(value, attention, ghost_mul, heads, channels // heads, kernel_size)
    if ghost_add is None:
        return out
    local = op.Conv(
        op.Transpose(value, perm=[0, 3, 1, 2]),
        op.Unsqueeze(ghost_add, ints(1)),
        group=channels,
        pads=[kernel_size // 2] * 4,
    )
    return op.Add(out, op.Transpose(local, perm=[0, 2, 3, 1]))


def _by_rows(value: Value, attention: Value, heads: int, width: int, kernel: int) -> Value:
    """Weighted sums of value [B, H, W, C] by attention [B, H, W, G, K*K], as products of matrices.

    A run of T neighbours in a row sees T + K - 1 columns. For each row of the neighbourhood, the
    run's weights are a band in a matrix [T, T + K - 1], which is multiplied by those columns.
    """
    margin, run = kernel // 2, _RUN + kernel - 1
    columns = op.Shape(value, start=2, end=3)
    runs = op.Div(op.Add(columns, ints(_RUN - 1)), ints(_RUN))
    missing = op.Sub(op.Mul(runs, ints(_RUN)), columns)
    border = op.Concat(
        ints(0, margin, margin, 0, 0, margin), op.Add(missing, ints(margin)), ints(0), axis=0
    )
    first = op.Mul(op.Range(scalar(0), op.Squeeze(runs), scalar(1)), ints(_RUN))
    seen = op.Add(op.Unsqueeze(first, ints(1)), constant(np.arange(run)))
    # [B, H + K - 1, runs, T + K - 1, C], then [B, G, H + K - 1, runs, T + K - 1, C/G].
    values = op.Gather(op.Pad(value, border), seen, axis=2)
    values = op.Reshape(values, ints(0, 0, 0, run, heads, width))
    values = op.Transpose(values, perm=[0, 4, 1, 2, 3, 5])
    # [B, H, runs * T, G, K*K], then [B, G, H, runs, K, T, K].
    weights = op.Pad(attention, op.Concat(ints(*[0] * 7), missing, ints(0, 0), axis=0))
    weights = op.Reshape(weights, ints(0, 0, -1, _RUN, heads, kernel, kernel))
    weights = op.Transpose(weights, perm=[0, 4, 1, 2, 5, 3, 6])
    out = None
    for row in range(kernel):
        band = op.Slice(weights, ints(row), ints(row + 1), ints(4))
        # Rows of one column more than the matrix has: read without it, each is one further right.
        band = op.Pad(band, ints(*[0] * 13, run + 1 - kernel))
        band = op.Reshape(band, ints(0, 0, 0, 0, _RUN * (run + 1)))
        band = op.Slice(band, ints(0), ints(_RUN * run), ints(4))
        band = op.Reshape(band, ints(0, 0, 0, 0, _RUN, run))
        # Counted from the far end, which needs no size.
        window = op.Slice(values, ints(row), ints(row - 2 * margin or _END), ints(2))
        term = op.MatMul(band, window)
        out = term if out is None else op.Add(out, term)
    out = op.Transpose(out, perm=[0, 2, 3, 4, 1, 5])
    return op.Slice(op.Reshape(out, ints(0, 0, -1, heads * width)), ints(0), columns, ints(2))


def _by_offsets(
    value: Value, attention: Value, ghost_mul: Value, heads: int, width: int, kernel: int
) -> Value:
    """As `_by_rows`, offset by offset, with a factor [C, K, K] for each channel."""
    margin = kernel // 2
    # [B, G, C/G, H, W] and [B, G, K*K, H, W]: long rows, along which one weight counts for C/G.
    values = op.Reshape(value, ints(0, 0, 0, heads, width))
    values = op.Transpose(values, perm=[0, 3, 4, 1, 2])
    values = op.Pad(values, ints(0, 0, 0, margin, margin, 0, 0, 0, margin, margin))
    attention = op.Transpose(attention, perm=[0, 3, 4, 1, 2])
    out = None
    for offset in range(kernel**2):
        start = divmod(offset, kernel)
        ky, kx = start
        end = [first - 2 * margin or _END for first in start]
        window = op.Slice(values, ints(*start), ints(*end), ints(3, 4))
        factor = op.Slice(ghost_mul, ints(ky, kx), ints(ky + 1, kx + 1), ints(1, 2))
        window = op.Mul(window, op.Reshape(factor, ints(1, heads, width, 1, 1)))
        term = op.Mul(window, op.Slice(attention, ints(offset), ints(offset + 1), ints(2)))
        out = term if out is None else op.Add(out, term)
    return op.Reshape(op.Transpose(out, perm=[0, 3, 4, 1, 2]), ints(0, 0, 0, heads * width))


def adaptive_average_pool(x: Value, size: Sequence[int]) -> Value:
    """`F.adaptive_avg_pool2d`, [B, C, H, W] -> [B, C, *size], for a map whose size is not known.

    A product with two matrices that hold each cell's share in the means.
    """
    shape = op.Shape(x, start=2, end=4)
    height, width = op.Slice(shape, ints(0), ints(1)), op.Slice(shape, ints(1), ints(2))
    rows, columns = _shares(height, size[0]), _shares(width, size[1])
    return op.MatMul(op.MatMul(rows, x), op.Transpose(columns, perm=[1, 0]))


def _shares(length: Value, cells: int) -> Value:
    """[cells, length]: 1 / n where a position is one of the n of a cell, else 0."""
    cell = np.arange(cells, dtype=np.int64)[:, None]
    begin = op.Div(op.Mul(constant(cell), length), ints(cells))
    end = op.Div(op.Add(op.Mul(constant(cell + 1), length), ints(cells - 1)), ints(cells))
    position = op.Range(scalar(0), op.Squeeze(length), scalar(1))
    inside = op.And(op.GreaterOrEqual(position, begin), op.Less(position, end))
    return op.Div(op.Cast(inside, to=1), op.Cast(op.Sub(end, begin), to=1))


def _patch_embed(module: PatchEmbed, image: Value) -> Value:
    x = convolution(module.proj, pad_image(image, module.patch_size))
    return layer_norm(module.norm, op.Transpose(x, perm=[0, 2, 3, 1]))


def _patch_merging(module: PatchMerging, x: Value) -> Value:
    odd = op.Mod(op.Shape(x, start=1, end=3), ints(2))
    x = _pad_map(x, odd)
    neighbours = [
        op.Slice(x, ints(row, column), ints(_END, _END), ints(1, 2), ints(2, 2))
        for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    x = layer_norm(module.norm, op.Concat(*neighbours, axis=3))
    return linear(x, module.reduction.weight, module.reduction.bias)


def residual_block(block: Any, x: Value, other: Callable[[Any, Value], Value]) -> Value:
    """`Block.forward` in evaluation; ``other`` is its attention where that is not ELSA."""
    attention = _elsa if isinstance(block.attn, ELSA) else other
    x = op.Add(x, attention(block.attn, layer_norm(block.norm1, x)))
    mlp = block.mlp
    hidden = linear(layer_norm(block.norm2, x), mlp.fc1.weight, mlp.fc1.bias)
    return op.Add(x, linear(op.Gelu(hidden), mlp.fc2.weight, mlp.fc2.bias))


def _elsa(module: Any, x: Value) -> Value:
    projected = linear(x, module.pre_proj.weight.flatten(1), module.pre_proj.bias)
    dim_qk, _, channels = module.split_sizes
    query = op.Slice(projected, ints(0), ints(dim_qk), ints(3))
    key = op.Slice(projected, ints(dim_qk), ints(2 * dim_qk), ints(3))
    value = op.Slice(projected, ints(2 * dim_qk), ints(_END), ints(3))
    grouped, _, pointwise = module.attn
    if module.qk_scale != 1:
        query = op.Mul(query, constant(np.float32(module.qk_scale)))
    logits = convolution(grouped, op.Transpose(op.Mul(query, key), perm=[0, 3, 1, 2]))
    logits = op.Gelu(op.Transpose(logits, perm=[0, 2, 3, 1]))
    logits = linear(logits, pointwise.weight.flatten(1), pointwise.bias)
    add, mul = (None if f is None else constant(f) for f in module.ghost_filters())
    x = elsa_attention(
        value,
        logits,
        add,
        mul,
        channels=channels,
        heads=module.num_heads,
        kernel_size=module.kernel_size,
    )
    return linear(x, module.post_proj.weight, module.post_proj.bias)


def _window_attention(module: WindowAttention, x: Value) -> Value:
    window, heads = module.window_size, module.num_heads
    area, channels = window**2, module.post_proj.in_features
    width = channels // heads
    batch, size = op.Shape(x, start=0, end=1), op.Shape(x, start=1, end=3)
    windows = op.Div(op.Add(size, ints(window - 1)), ints(window))
    rows, columns = op.Slice(windows, ints(0), ints(1)), op.Slice(windows, ints(1), ints(2))
    full = op.Mul(windows, ints(window))
    shift = _shift(module, size)
    x = _roll(_pad_map(x, op.Sub(full, size)), shift)
    x = linear(x, module.pre_proj.weight, module.pre_proj.bias)
    x = op.Reshape(
        x, op.Concat(batch, rows, ints(window), columns, ints(window, 3, heads, width), axis=0)
    )
    x = op.Transpose(x, perm=[5, 0, 1, 3, 6, 2, 4, 7])
    count = op.Mul(rows, columns)
    x = op.Reshape(x, op.Concat(ints(3), batch, count, ints(heads, area, width), axis=0))
    value, query, key = (op.Squeeze(part, ints(0)) for part in op.Split(x, num_outputs=3, axis=0))
    scale = constant(np.float32(width**-0.5))
    logits = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 2, 4, 3]))
    bias = module.rb[:, module.relative_id].reshape(heads, area, area)
    logits = op.Add(logits, constant(bias))
    if shift is not None:
        logits = op.Add(logits, _shift_mask(rows, columns, window, shift))
    x = op.MatMul(op.Softmax(logits, axis=-1), value)
    x = op.Reshape(x, op.Concat(batch, rows, columns, ints(heads, window, window, width), axis=0))
    x = op.Transpose(x, perm=[0, 1, 4, 2, 5, 3, 6])
    x = _roll(op.Reshape(x, op.Concat(batch, full, ints(channels), axis=0)), shift, back=True)
    x = op.Slice(x, ints(0, 0), size, ints(1, 2))
    return linear(x, module.post_proj.weight, module.post_proj.bias)


def _shift(module: WindowAttention, size: Value) -> Value | None:
    """By how many positions a map of this size is shifted, [1]; None: none of any size is."""
    if not module.shift:
        return None
    shift = ints(module.shift)
    if module.always_shift:
        return shift
    larger = op.Greater(op.ReduceMin(size, keepdims=1), ints(module.window_size))
    return op.Mul(shift, op.Cast(larger, to=7))


def _shift_mask(rows: Value, columns: Value, window: int, shift: Value) -> Value:
    """`elsa_core.layers.shift_mask` with an axis for the heads."""

    def regions(count: Value, *shape: int) -> Value:
        length = op.Mul(count, ints(window))
        position = op.Range(scalar(0), op.Squeeze(length), scalar(1))
        borders = [op.Sub(length, width) for width in (ints(window), shift)]
        parts = [op.Cast(op.GreaterOrEqual(position, border), to=7) for border in borders]
        return op.Reshape(op.Add(*parts), ints(*shape))

    region = op.Add(
        op.Mul(regions(rows, -1, 1, window, 1), ints(3)), regions(columns, 1, -1, 1, window)
    )
    region = op.Reshape(region, ints(-1, 1, 1, window**2))
    apart = op.Not(op.Equal(region, op.Transpose(region, perm=[0, 1, 3, 2])))
    return op.Mul(op.Cast(apart, to=1), constant(np.float32(-100)))


def convolution(module: nn.Conv2d, x: Value) -> Value:
    """`Conv2d.forward`, [B, C, H, W] -> [B, C', H', W'], with zero padding."""
    weights = [constant(part) for part in (module.weight, module.bias) if part is not None]
    pads, strides = [*module.padding] * 2, [*module.stride]
    return op.Conv(x, *weights, group=module.groups, pads=pads, strides=strides)


def pad_image(image: Value, size: int) -> Value:
    """[B, C, H, W] with zeros at the bottom and right up to multiples of ``size``."""
    missing = op.Mod(op.Neg(op.Shape(image, start=2, end=4)), ints(size))
    return op.Pad(image, op.Concat(ints(0, 0, 0, 0, 0, 0), missing, axis=0))


def _pad_map(x: Value, missing: Value) -> Value:
    """[B, H, W, C] with so many zeros more at the bottom and right.

    Without Pad's input of axes, which onnxruntime 1.23 gets wrong when it moves transpositions.
    """
    return op.Pad(x, op.Concat(ints(0, 0, 0, 0, 0), missing, ints(0), axis=0))


def _roll(x: Value, shift: Value | None, back: bool = False) -> Value:
    """The map moved up and left by ``shift`` positions, what leaves it comes in at the far end."""
    if shift is None:
        return x
    border = op.Neg(shift) if back else shift
    for axis in (1, 2):
        first = op.Slice(x, ints(0), border, ints(axis))
        rest = op.Slice(x, border, ints(_END), ints(axis))
        x = op.Concat(rest, first, axis=axis)
    return x


def layer_norm(norm: nn.LayerNorm, x: Value) -> Value:
    weight, bias = constant(norm.weight), constant(norm.bias)
    return op.LayerNormalization(x, weight, bias, axis=-1, epsilon=norm.eps)[0]


def linear(x: Value, weight: Tensor, bias: Tensor | None) -> Value:
    x = op.MatMul(x, constant(weight.t()))
    return x if bias is None else op.Add(x, constant(bias))


def constant(array: Any) -> Value:
    if isinstance(array, Tensor):
        array = array.detach().to("cpu", torch.float32).contiguous().numpy()
    return op.Constant(value=onnx_ir.tensor(np.asarray(array)))


def ints(*values: int) -> Value:
    return op.Constant(value_ints=list(values))


def scalar(value: int) -> Value:
    return op.Constant(value_int=value)
