"""Synchronized batch normalization that also works on CPUs and with empty inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor, nn


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with mean and variance over the inputs of all processes, on any device.

    Maps [N, C, H, W] to the same shape. N may differ between processes and may be 0, which
    `nn.SyncBatchNorm` refuses on CPUs; if it is 0 everywhere, the running statistics do not change.

    Detectron2's naiveSyncBN_N takes such inputs, too, but its running variance is biased (by 7%
    with the 16 cells of UPerNet's coarsest pooling on 8 GPUs), and it subtracts squares in the
    dtype of the input, which costs bfloat16 a decimal.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and comm.get_world_size() > 1:
            return self._synced(input)
        if input.numel() == 0:
            # Gives the parameters a gradient in each process.
            return input + 0 * (self.weight.sum() + self.bias.sum()).to(input.dtype)
        return super().forward(input)

    def _synced(self, input: Tensor) -> Tensor:
        x = input.float()
        dims = [dim for dim in range(x.dim()) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        number = x.new_tensor([x.numel() // x.shape[1]])
        total = differentiable_all_reduce(torch.cat([x.sum(dims), number]))
        number = total[-1].detach().clamp(min=1)
        mean = total[:-1] / number
        centred = x - mean.reshape(shape)
        variance = differentiable_all_reduce(centred.square().sum(dims)) / number
        if total[-1] > 0:
            unbiased = variance.detach() * number / (number - 1).clamp(min=1)
            statistics: Any = self
            statistics.running_mean.lerp_(mean.detach(), self.momentum)
            statistics.running_var.lerp_(unbiased, self.momentum)
            statistics.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.reshape(shape) + self.bias.reshape(shape)).to(input.dtype)


def resolve_norm(name: str) -> str | Callable[[int], nn.Module]:
    """Returns what Detectron2's ``get_norm`` takes for a NORM key; "SyncBN" is `SyncBatchNorm`."""
    return SyncBatchNorm if name == "SyncBN" else name
