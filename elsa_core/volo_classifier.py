"""ELSA-VOLO for classification: class attention, token classifier and MixToken (arXiv 2106.13112).

MixToken and the token classifier come from token labelling (arXiv 2104.10858).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import MLP, run_blocks
from .linear import Linear
from .variants import VoloArch
from .volo import ELSAVolo

_CLASS_BLOCKS = 2


class ClassAttention(nn.Module):
    """Attention of the first token to all: [B, N, C] -> [B, 1, C]."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        key, value = pairs.unbind(0)
        query = self.q(x[:, :1]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.proj(out.transpose(1, 2).flatten(2))


class ClassBlock(nn.Module):
    """Updates the first of the tokens [B, N, C] by class attention and an MLP, and no other."""

    def __init__(self, dim: int, attn: ClassAttention, mlp_ratio: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_ratio * dim, drop)

    def forward(self, x: Tensor) -> Tensor:
        token = x[:, :1] + self.attn(self.norm1(x))
        token = token + self.mlp(self.norm2(token))
        return torch.cat([token, x[:, 1:]], dim=1)


class ELSAVoloTokens(ELSAVolo):
    """ELSA-VOLO up to its classifiers.

    Maps an image [B, in_chans, H, W] to the class token [B, D], the map of the patch tokens
    [B, D, H/16, W/16], and the box that MixToken has swapped: int64 [4] with top, left, bottom and
    right in positions of that map, all 0 where nothing was swapped.

    MixToken acts in training: one box of uniform relative area and centre is swapped between each
    image and its counterpart in the reversed batch, right after the stem. `swap_box` undoes it in
    what the tokens are classified as.

    Args:
        class_token: False for models without: the mean of the patch tokens stands for it.
        mix_token: swap a box in training.
        options: arguments of `ELSAVolo`, without ``out_indices`` and ``pyramid``.

    Raises:
        ValueError: as `ELSAVolo`.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | VoloArch = "volo_d1",
        class_token: bool = True,
        mix_token: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        init_std: float = 0.02,
        **options: Any,
    ) -> None:
        super().__init__(
            arch,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            init_std=init_std,
            out_indices=(3,),
            pyramid=False,
            **options,
        )
        del self.norm3  # `norm` normalises all tokens
        dim, heads = self.arch.embed_dims[1], self.arch.num_heads[1]
        self.mix_token = mix_token
        self.post_network: nn.ModuleList | None = None
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
            nn.init.normal_(self.cls_token, std=0.02)
            blocks = [
                ClassBlock(
                    dim,
                    ClassAttention(dim, heads, self.arch.qkv_bias, attn_drop_rate),
                    self.arch.mlp_ratio,
                    drop_rate,
                )
                for _ in range(_CLASS_BLOCKS)
            ]
            self.post_network = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self._init_linear(init_std)

    def layer_names(self) -> list[tuple[str, ...]]:
        blocks = range(len(self.post_network or ()))
        return super().layer_names() + [(f"post_network.{block}.",) for block in blocks]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self._embed(x)
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        box = torch.zeros(4, dtype=torch.long, device=x.device)
        if self.mix_token and self.training:
            box = random_box(rows, columns, x.device)
            x = swap_box(x, 2 * box)
        tokens = self._run_stages(x)[-1].flatten(1, 2)
        if self.post_network is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
            tokens = run_blocks(self.post_network, tokens, self.with_cp and self.training)
        tokens = self.norm(tokens)
        if self.post_network is None:
            token = tokens.mean(1)
        else:
            token, tokens = tokens[:, 0], tokens[:, 1:]
        return token, tokens.unflatten(1, (rows, columns)).permute(0, 3, 1, 2), box


class ELSAVoloClassifier(ELSAVoloTokens):
    """ELSA-VOLO with its classifiers: [B, in_chans, H, W] -> [B, num_classes].

    In evaluation the logits are those of the class token plus half of each class's largest one of
    all patch tokens. In training with ``aux_head`` the result is the class token's logits
    [B, num_classes], the patch tokens' [B, N, num_classes], with MixToken undone, and MixToken's
    box, as in `ELSAVoloTokens`.

    Args:
        num_classes: number of classes.
        aux_head: classify the patch tokens.
        class_token, mix_token, options: as in `ELSAVoloTokens`; ``mix_token`` is ``aux_head``
            unless given.

    Raises:
        ValueError: as `ELSAVolo`; for ``aux_head`` without ``class_token``, and ``mix_token``
            without ``aux_head``.
    """

    heads = ("head.", "aux_head.")

    def __init__(
        self,
        arch: str | Mapping[str, Any] | VoloArch = "volo_d1",
        num_classes: int = 1000,
        aux_head: bool = True,
        class_token: bool = True,
        mix_token: bool | None = None,
        init_std: float = 0.02,
        **options: Any,
    ) -> None:
        mix_token = aux_head if mix_token is None else mix_token
        if aux_head and not class_token:
            raise ValueError("aux_head needs class_token, got class_token=False")
        if mix_token and not aux_head:
            raise ValueError("mix_token needs aux_head, got aux_head=False")
        super().__init__(arch, class_token, mix_token, init_std=init_std, **options)
        dim = self.arch.embed_dims[1]
        self.head = nn.Linear(dim, num_classes)
        self.aux_head = nn.Linear(dim, num_classes) if aux_head else None
        self._init_linear(init_std)

    def forward(self, x: Tensor) -> Any:
        token, patches, box = super().forward(x)
        logits = self.head(token)
        if self.aux_head is None:
            return logits
        aux = self.aux_head(patches.permute(0, 2, 3, 1))
        if not self.training:
            return combined_logits(logits, aux)
        return logits, swap_box(aux, box).flatten(1, 2), box


def combined_logits(logits: Tensor, aux: Tensor) -> Tensor:
    """Return the logits of evaluation [B, classes] from the class token's [B, classes] and the
    patch tokens' [B, H, W, classes]."""
    return logits + 0.5 * aux.flatten(1, 2).amax(1)


def random_box(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Return a random box of a map: int64 [4], top, left, bottom, right.

    Its relative area and its centre are uniform; what lies outside the map is cut off.
    """
    area, *centre = torch.rand(3, device=device).unbind()
    lengths = area.new_tensor([rows, columns])
    half = ((lengths * area.sqrt()).long()) // 2
    middle = (lengths * torch.stack(centre)).long()
    limit = lengths.long()
    return torch.cat([(middle - half).clamp(min=0), torch.minimum(middle + half, limit)])


def swap_box(x: Tensor, box: Tensor) -> Tensor:
    """Swap a box of a map [B, H, W, C] with that of the reversed batch; twice is the identity."""
    row = torch.arange(x.shape[1], device=x.device)[:, None]
    column = torch.arange(x.shape[2], device=x.device)
    top, left, bottom, right = box.unbind()
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return torch.where(inside[..., None], x.flip(0), x)
