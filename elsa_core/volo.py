"""ELSA-VOLO: VOLO (arXiv 2106.13112) with ELSA (arXiv 2112.12786) as its local attention.

The paper gives accuracy and FLOPs of this family, but no code, configuration or checkpoint was
ever published. It is reconstructed here, as docs/elsa_volo.md explains; there are no official
weights. Parameter names are VOLO's, those of the local attention ELSA's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import StagedBackbone
from .blocks import Block, run_blocks
from .layers import ELSA, GlobalAttention, pad_to_multiple
from .linear import is_plain
from .variants import VoloArch

logger = logging.getLogger(__name__)
_DIVISOR = 16  # of the sides of padded images: the stride of the global stages
_KEPT_SIZES = 8
_OPTIONAL_PART = re.compile(r"(network\.[0-4]|norm[0-3]|pos_embed|upsample)(\.|$)")


class ConvStem(nn.Module):
    """Image [B, C_in, H, W] -> map [B, H/8, W/8, C]: VOLO's three convolutions and its patches."""

    patch_size = 8

    def __init__(self, in_chans: int, stem_dim: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, channels in enumerate((in_chans, stem_dim, stem_dim)):
            size, stride = (3, 1) if index else (7, 2)
            layers += [
                nn.Conv2d(channels, stem_dim, size, stride, padding=size // 2, bias=False),
                nn.BatchNorm2d(stem_dim),
                nn.ReLU(inplace=True),
            ]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(stem_dim, dim, kernel_size=4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.proj(self.conv(x)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Halves a map by a convolution of 2x2 pixels: [B, H, W, C] -> [B, H/2, W/2, D]."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ELSAVolo(StagedBackbone):
    """A VOLO that attends with ELSA in its first stage, for dense prediction.

    Maps an image [B, in_chans, H, W] to a tuple of [B, C_i, H_i, W_i], one for each of
    ``out_indices``. The image is padded with zeros at the bottom and right to multiples of 16, and
    the position embedding resized to it; H_i and W_i are the padded sides divided by
    ``strides[i]``, C_i is ``num_features[i]``. The outputs are views with channels-last strides.

    By default the maps are those of VOLO's four stages, at strides 8, 16, 16, 16. With ``pyramid``
    they have the strides 4, 8, 16, 32 that heads on a feature pyramid expect: the first stage's map
    enlarged by a transposed convolution, ``upsample``, to half the channels; the same map; the
    last stage's map; and its maximum over 2x2 positions (sides rounded up). This pyramid is a
    design of this project in the manner of ViTDet (arXiv 2203.16527).

    Stages that no output needs are not built. As in VOLO, stochastic depth never reaches the first
    stage, although its blocks count in the linear rule, unless ``local_drop_path``.

    `load_state_dict` resizes a position embedding of another grid, and drops the stages that are
    not built, each with one line in the log, and the output norms and ``upsample`` of other
    outputs. What tells that a checkpoint has the maps of the other ``pyramid``, or a classifier, is
    reported as unknown: `elsa_core.weights.load_backbone` takes what fits of it.

    Args:
        arch: "volo_d1" to "volo_d5" or a dict with the fields of `elsa_core.variants.VoloArch`.
        in_chans: channels of the image.
        img_size: side of the square images that the position embedding is made for.
        drop_path_rate: stochastic depth of the last block, rising linearly over all blocks.
        drop_rate: dropout after the position embedding, the attention layers and in the MLPs.
        attn_drop_rate: dropout of the attention weights; above 0, ELSA trains on a slower path
            (see `elsa_core.layers.ELSA`).
        out_indices: maps that are returned, each through an output norm of its own.
        frozen_stages: 0 freezes the stem; 1 also the first stage, what follows it and the position
            embedding; i >= 2 also the stages up to the i-th: no gradients, and evaluation mode
            that `train` does not end. Output norms and ``upsample``, which no classifier has, stay
            trainable.
        with_cp: recompute the blocks' activations in the backward pass to save memory.
        init_std: standard deviation of the linear layers' first weights.
        pyramid: return maps at strides 4, 8, 16, 32.
        norm_eval: keep the stem's batch norms in evaluation mode, for small batches.
        local_drop_path: stochastic depth in the first stage, too.

    Raises:
        ValueError: an unknown or contradictory ``arch``, or rates, ``img_size``, ``out_indices``
            or ``frozen_stages`` out of range; in `forward`, an input of another shape.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | VoloArch = "volo_d1",
        in_chans: int = 3,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_std: float = 0.02,
        pyramid: bool = False,
        norm_eval: bool = False,
        local_drop_path: bool = False,
    ) -> None:
        arch = VoloArch.from_spec(arch)
        dims = arch.num_features
        super().__init__(
            [dims[0] // 2, dims[0], dims[1], dims[1]] if pyramid else dims,
            in_chans,
            out_indices,
            frozen_stages,
            init_std,
            drop_path_rate=drop_path_rate,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
        )
        if type(img_size) is not int or img_size < 1:
            raise ValueError(f"img_size must be an integer of at least 1, got {img_size=}")
        self.arch = arch
        self.img_size = img_size
        self.with_cp = with_cp
        self.pyramid = pyramid
        self.norm_eval = norm_eval
        self.strides = [4, 8, 16, 32] if pyramid else [8, 16, 16, 16]
        # The stage that each output is made of.
        self.stage_of = (0, 0, 3, 3) if pyramid else (0, 1, 2, 3)

        self.patch_embed = ConvStem(in_chans, arch.stem_dim, dims[0])
        self.network = nn.ModuleList()
        last_block = max(sum(arch.depths) - 1, 1)
        for stage in range(self.stage_of[self.out_indices[-1]] + 1):
            first_block = sum(arch.depths[:stage])
            drop_path = drop_path_rate if stage or local_drop_path else 0.0
            blocks = [
                Block(
                    dims[stage],
                    self._make_attention(stage, attn_drop_rate, drop_rate),
                    drop_rate,
                    drop_path * (first_block + index) / last_block,
                    arch.mlp_ratio,
                )
                for index in range(arch.depths[stage])
            ]
            if stage == 1:
                self.network.append(Downsample(*arch.embed_dims))
                side = -(-img_size // _DIVISOR)
                self.pos_embed = nn.Parameter(torch.empty(1, side, side, arch.embed_dims[1]))
                self.reset_parameters()
                self.pos_drop = nn.Dropout(drop_rate)
            self.network.append(nn.Sequential(*blocks))
        if pyramid and 0 in self.out_indices:
            self.upsample = nn.ConvTranspose2d(dims[0], dims[0] // 2, kernel_size=2, stride=2)
        for index in self.out_indices:
            self.add_module(f"norm{index}", nn.LayerNorm(self.num_features[index]))

        # Per size of the grid: the embedding that was resized, and the result.
        self._resized: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._init_linear(init_std)
        self.register_load_state_dict_pre_hook(_fit_state_dict)
        self.train()

    def reset_parameters(self) -> None:
        """Initialise the position embedding; child layers have their own method."""
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    def _make_attention(self, stage: int, attn_drop: float, proj_drop: float) -> nn.Module:
        arch = self.arch
        if stage:
            dim, heads = arch.embed_dims[1], arch.num_heads[1]
            return GlobalAttention(dim, heads, arch.qkv_bias, attn_drop, proj_drop)
        return ELSA(
            arch.embed_dims[0],
            arch.num_heads[0],
            arch.kernel_size,
            arch.group_width,
            arch.lam,
            arch.gamma,
            attn_drop,
            proj_drop,
            arch.qkv_bias,
            arch.qk_scale,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.stage_maps(x)[1:]
        return tuple(self._output(index, maps[self.stage_of[index]]) for index in self.out_indices)

    def _output(self, index: int, x: Tensor) -> Tensor:
        """Return the output ``index`` [B, C_i, H_i, W_i] made of a stage's map [B, H, W, C]."""
        if self.pyramid and index in (0, 3):
            x = x.permute(0, 3, 1, 2)
            x = F.max_pool2d(x, 2, ceil_mode=True) if index else self.upsample(x)
            x = x.permute(0, 2, 3, 1)
        return self.get_submodule(f"norm{index}")(x).permute(0, 3, 1, 2)

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        return self._run_stages(self._embed(x))

    def _embed(self, x: Tensor) -> Tensor:
        """Return the stem's map [B, H/8, W/8, C] of an image, padded."""
        self.check_image(x)
        return self.patch_embed(pad_to_multiple(x, _DIVISOR, first=2))

    def _run_stages(self, x: Tensor) -> list[Tensor]:
        """Return the stem's map ``x`` and each stage's, [B, H, W, C]."""
        maps = [x]
        for index, part in enumerate(self.network):
            if index == 1:
                x = part(x)
                x = self.pos_drop(x + self.position(x))
                continue
            assert isinstance(part, nn.Sequential)
            x = run_blocks(part, x, self.with_cp and self.training)
            maps.append(x)
        return maps

    def position(self, x: Tensor) -> Tensor:
        """Return the position embedding [1, H, W, D] for a map ``x`` of these sides.

        Without gradients on the CPU a resized embedding is kept for as long as it stays the same.
        """
        position, size = self.pos_embed, (x.shape[1], x.shape[2])
        if torch.is_grad_enabled() or not is_plain(x) or position.shape[1:3] == size:
            return resize_position(position, size)
        source, resized = self._resized.pop(size, (None, None))
        if (
            source is None
            or resized is None
            or source.dtype != position.dtype
            or not torch.equal(source, position)
        ):
            source, resized = position.detach().clone(), resize_position(position, size).detach()
            for oldest in list(self._resized)[: 1 - _KEPT_SIZES]:
                self._resized.pop(oldest, None)  # another thread may have
        self._resized[size] = (source, resized)  # the last one used goes last
        return resized

    def train(self, mode: bool = True) -> ELSAVolo:
        super().train(mode)
        if self.norm_eval:
            for module in self.patch_embed.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def layer_names(self) -> list[tuple[str, ...]]:
        names: list[tuple[str, ...]] = [("patch_embed.", "pos_embed", "cls_token")]
        for index, part in enumerate(self.network):
            if isinstance(part, nn.Sequential):
                names += [(f"network.{index}.{block}.",) for block in range(len(part))]
            else:
                names[-1] += (f"network.{index}.",)
        return names

    def frozen_parts(self) -> Iterable[nn.Module | nn.Parameter]:
        yield self.patch_embed
        if self.frozen_stages:  # the second entry of `network` is no stage
            yield from self.network[: self.frozen_stages + 1]
            if len(self.network) > 1:
                yield from (self.pos_embed, self.pos_drop)


def resize_position(position: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a position embedding, [1, h, w, D] -> [1, *size, D], bicubically.

    The centres of the outermost positions lie half a position inside the image, as when VOLO's
    checkpoints are loaded at another size (arXiv 2106.13112).
    """
    if _is_equal(position.shape[1], size[0]) and _is_equal(position.shape[2], size[1]):
        return position
    resized = F.interpolate(position.permute(0, 3, 1, 2), size, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def _is_equal(length: int, other: int) -> bool:
    """Whether two lengths are equal, without binding a compiled program to those that are not."""
    if not torch.compiler.is_compiling():
        return length == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(length == other))


def _fit_state_dict(module: ELSAVolo, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    drop_unused_parts(module, state_dict, prefix)
    if (position := getattr(module, "pos_embed", None)) is not None:
        fit_position(state_dict, f"{prefix}pos_embed", position)


def drop_unused_parts(
    module: ELSAVolo, state_dict: MutableMapping[str, Any], prefix: str = ""
) -> None:
    """Remove, in place, what other outputs of the model ``module`` under ``prefix`` need."""
    built = {name for name, _ in module.named_modules()} | {"pos_embed"} & module._parameters.keys()
    unused = 0
    for key in [key for key in state_dict if key.startswith(prefix)]:
        part = _OPTIONAL_PART.match(key.removeprefix(prefix))
        if part and part[1] not in built and _belongs(module, part[1], state_dict[key]):
            del state_dict[key]
            unused += part[1].startswith("network")
    if unused:
        logger.warning(
            f"{unused} tensors of a checkpoint are not used: they are of stages that none of the "
            f"outputs {module.out_indices} needs"
        )


def fit_position(state_dict: MutableMapping[str, Any], name: str, wanted: Tensor) -> None:
    """Resize, in place, the position embedding ``name`` to that of a model."""
    given = state_dict.get(name)
    if not isinstance(given, Tensor) or given.dim() != 4 or not given.numel():
        return
    if given.shape[1:3] != wanted.shape[1:3] and given.shape[::3] == wanted.shape[::3]:
        size = (wanted.shape[1], wanted.shape[2])
        state_dict[name] = resize_position(given.double(), size).to(given.dtype)
        logger.warning(f"{name} is resized from {tuple(given.shape[1:3])} to {size} positions")


def _belongs(module: ELSAVolo, part: str, tensor: Any) -> bool:
    """Whether a part that is not built is of this kind of maps, not of the other ``pyramid``."""
    if part.startswith("norm"):
        shape = (module.num_features[int(part[-1])],)
        return isinstance(tensor, Tensor) and tuple(tensor.shape) == shape
    return part != "upsample" or module.pyramid
