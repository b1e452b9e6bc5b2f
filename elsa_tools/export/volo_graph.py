"""ELSA-VOLO in standard ONNX operators, for images of any size; see `graph`."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import opset20 as op
from torch import nn

from elsa_core.layers import GlobalAttention

from .graph import (
    Value,
    constant,
    convolution,
    ints,
    layer_norm,
    linear,
    pad_image,
    residual_block,
)


def backbone(module: Any, image: Value) -> list[Value]:
    """`ELSAVolo.forward` in evaluation: [B, C, H, W] -> [B, C_i, H_i, W_i] of each output."""
    x = _stem(module.patch_embed, pad_image(image, 16))
    maps = []
    for index, part in enumerate(module.network):
        if index == 1:
            x = _to_last(convolution(part.proj, _to_first(x)))
            x = op.Add(x, _position(module.pos_embed, x))
            continue
        for block in part:
            x = residual_block(block, x, _global_attention)
        maps.append(x)
    return [_output(module, index, maps[module.stage_of[index]]) for index in module.out_indices]


def _output(module: Any, index: int, x: Value) -> Value:
    if module.pyramid and index in (0, 3):
        x = _to_first(x)
        if index:
            x = op.MaxPool(x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)[0]
        else:
            up = module.upsample
            weights = constant(up.weight), constant(up.bias)
            x = op.ConvTranspose(x, *weights, strides=[*up.stride])
        x = _to_last(x)
    return _to_first(layer_norm(getattr(module, f"norm{index}"), x))


def _stem(module: Any, x: Value) -> Value:
    for layer in module.conv:
        if isinstance(layer, nn.Conv2d):
            x = convolution(layer, x)
        elif isinstance(layer, nn.BatchNorm2d):
            numbers = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
            x = op.BatchNormalization(x, *map(constant, numbers), epsilon=layer.eps)
        else:
            x = op.Relu(x)
    return _to_last(convolution(module.proj, x))


def _position(embedding: Any, x: Value) -> Value:
    """`resize_position` to the size of a map: PyTorch's bicubic filter has a = -0.75."""
    channels = embedding.shape[3]
    size = op.Concat(ints(1, channels), op.Shape(x, start=1, end=3), axis=0)
    resized = op.Resize(
        constant(embedding.permute(0, 3, 1, 2)),
        None,
        None,
        size,
        mode="cubic",
        cubic_coeff_a=-0.75,
        coordinate_transformation_mode="half_pixel",
    )
    return _to_last(resized)


def _global_attention(module: GlobalAttention, x: Value) -> Value:
    heads, channels = module.num_heads, module.proj.in_features
    scale = constant(np.float32((channels // heads) ** -0.5))
    tokens = op.Reshape(x, ints(0, -1, channels))
    parts = op.Reshape(linear(tokens, module.qkv.weight, module.qkv.bias), ints(0, 0, 3, heads, -1))
    parts = op.Transpose(parts, perm=[2, 0, 3, 1, 4])
    query, key, value = (
        op.Squeeze(part, ints(0)) for part in op.Split(parts, num_outputs=3, axis=0)
    )
    logits = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 3, 2]))
    out = op.Transpose(op.MatMul(op.Softmax(logits, axis=-1), value), perm=[0, 2, 1, 3])
    out = op.Reshape(out, ints(0, 0, channels))
    return op.Reshape(linear(out, module.proj.weight, module.proj.bias), op.Shape(x))


def _to_first(x: Value) -> Value:
    return op.Transpose(x, perm=[0, 3, 1, 2])


def _to_last(x: Value) -> Value:
    return op.Transpose(x, perm=[0, 2, 3, 1])
