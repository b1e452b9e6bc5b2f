"""What the heads of detectors compute faster at inference on the CPU than the frameworks do.

`torch.ops.elsa.roi_align` pools boxes, `linear.fast_linear` multiplies by oneDNN, and the layers of
a mask head have the memory layout in which CPUs compute them fastest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import linear


def pools_fast(feature: Tensor, boxes: Tensor) -> bool:
    """Whether `torch.ops.elsa.roi_align` is the faster one: eager float32 on the CPU.

    No gradients may be needed.
    """
    needs_grad = torch.is_grad_enabled() and (feature.requires_grad or boxes.requires_grad)
    return not needs_grad and linear.is_fast(feature, boxes)


def upsamples_fast(x: Tensor, deconv: nn.Module | None, predictor: nn.Module) -> bool:
    """Whether `mask_logits` can compute these layers and is faster: eager float32 on the CPU.

    Gradients must be disabled.
    """
    return bool(
        not torch.is_grad_enabled()
        and isinstance(deconv, nn.ConvTranspose2d)
        and isinstance(predictor, nn.Conv2d)
        and deconv.kernel_size == deconv.stride
        and deconv.padding == deconv.output_padding == (0, 0)
        and deconv.dilation == (1, 1)
        and deconv.groups == predictor.groups == 1
        and predictor.kernel_size == predictor.stride == (1, 1)
        and predictor.padding == (0, 0)
        and linear.is_fast(x, deconv.weight)
        and linear.is_fast(x, predictor.weight)
    )


def mask_logits(x: Tensor, deconv: nn.ConvTranspose2d, predictor: nn.Conv2d) -> Tensor:
    """Returns ``predictor(relu(deconv(x)))``, [R, K, s * h, s * w], of features [R, C, h, w].

    A transposed convolution whose windows do not overlap is a linear layer of each pixel.
    """
    high, wide = deconv.stride
    weight = deconv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    bias = None if deconv.bias is None else deconv.bias.repeat(high * wide)
    x = linear.linear(x.permute(0, 2, 3, 1), weight, bias).relu_()
    x = x.unflatten(-1, (high, wide, -1))
    x = linear.linear(x, predictor.weight.flatten(1), predictor.bias)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
