"""ELSA composed of its definition: slow, and independent of the layer."""

import math

import torch
import torch.nn.functional as F

from elsa_core import elsa_attention_reference


def randomise(module):
    """Biases and ghost filters that are large enough to matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def naive_elsa(layer, x, dim_qk, lam, gamma, qk_scale=1):
    """From the layer's parameters alone, channels first."""
    weights = dict(layer.named_parameters())
    channels, kernel_size = x.shape[-1], layer.kernel_size
    projected = F.conv2d(
        x.permute(0, 3, 1, 2).contiguous(), weights["pre_proj.weight"], weights.get("pre_proj.bias")
    )
    query, key = projected[:, :dim_qk], projected[:, dim_qk : 2 * dim_qk]
    value = projected[:, 2 * dim_qk :]
    logits = F.conv2d(
        query * key * qk_scale,
        weights["attn.0.weight"],
        weights["attn.0.bias"],
        padding=kernel_size // 2,
        groups=dim_qk // weights["attn.0.weight"].shape[1],
    )
    logits = F.conv2d(
        logits * 0.5 * (1 + torch.erf(logits / math.sqrt(2))),
        weights["attn.2.weight"],
        weights["attn.2.bias"],
    )
    assert value.shape[1] == channels
    mul = add = None
    if lam and gamma:
        mul, add = weights["ghost_head"][0, 0], weights["ghost_head"][1, 0]
    elif lam:
        mul = weights["ghost_head"][0]
    elif gamma:
        add = weights["ghost_head"][0]
    out = elsa_attention_reference(
        value.permute(0, 2, 3, 1),
        logits.permute(0, 2, 3, 1),
        None if add is None else gamma * add,
        None if mul is None else mul.pow(lam),
        kernel_size=kernel_size,
    )
    return F.linear(out, weights["post_proj.weight"], weights["post_proj.bias"])
