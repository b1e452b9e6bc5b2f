"""Building blocks of the stages, all for channels-last maps [B, H, W, C]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import pad_to_multiple
from .linear import Linear


class PatchEmbed(nn.Module):
    """Image [B, C_in, H, W] -> normalised 4x4 patches [B, ceil(H/4), ceil(W/4), C].

    The image is padded with zeros at the bottom and right to multiples of 4.
    """

    patch_size = 4

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, self.patch_size, first=2)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Halves the map, [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C].

    The 2x2 neighbours are concatenated in the order (0, 0), (1, 0), (0, 1), (1, 1) of
    (row, column); odd maps are padded with zeros at the bottom and right.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, 2, first=1)
        x = x.unflatten(2, (x.shape[2] // 2, 2)).unflatten(1, (x.shape[1] // 2, 2))
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class MLP(nn.Module):
    """Linear, exact GELU, linear on the last dimension."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop.p > 0:
            return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        if torch.is_grad_enabled():
            return self.fc2(self.fc1(x), gelu_before=True)
        return self.fc2(self.fc1(x, gelu_after=True))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch per sample.

    While training, each sample is zeroed with probability ``rate`` and otherwise divided by
    1 - ``rate``.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class Block(nn.Module):
    """Pre-norm residual block around any attention layer that keeps the shape [B, H, W, C]."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        drop: float = 0.0,
        drop_path: float = 0.0,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_ratio * dim, drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, with_cp: bool) -> Tensor:
    """Apply blocks one after the other; ``with_cp`` recomputes them in the backward pass."""
    recompute = with_cp and torch.is_grad_enabled()
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


class Stage(nn.Module):
    """Blocks of one resolution, followed by ``downsample`` to the next one.

    Returns the map after the blocks and the input of the next stage, which is the same map without
    ``downsample``. ``with_cp`` recomputes each block's activations in the backward pass.
    """

    def __init__(
        self, blocks: Sequence[Block], downsample: PatchMerging | None, with_cp: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = run_blocks(self.blocks, x, self.with_cp and self.training)
        return x, x if self.downsample is None else self.downsample(x)
