"""The ELSA-Swin backbone (arXiv 2112.12786) for dense prediction and classification."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from .blocks import Block, PatchEmbed, PatchMerging, Stage
from .checkpoint import drop_unused_keys
from .layers import ELSA, WindowAttention
from .variants import Arch

_Self = TypeVar("_Self", bound="StagedBackbone")


class StagedBackbone(nn.Module):
    """Base of both families: stages whose maps are returned, frozen or not built.

    Args:
        num_features: channels of each map that can be returned.
        in_chans, out_indices, frozen_stages, init_std: as in `ELSASwin`.
        rates: probabilities, by the argument's name.

    Raises:
        ValueError: a value is out of range.
    """

    # Beginnings of the names of parameters that are not the backbone's.
    heads: tuple[str, ...] = ()

    def __init__(
        self,
        num_features: Sequence[int],
        in_chans: int,
        out_indices: Sequence[int],
        frozen_stages: int,
        init_std: float,
        **rates: float,
    ) -> None:
        super().__init__()
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans=}")
        self.num_features = list(num_features)
        self.in_chans = in_chans
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        for name, rate in rates.items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1), got {name}={rate}")
        if not init_std > 0:
            raise ValueError(f"init_std must be positive, got {init_std=}")
        stages = len(self.num_features)
        if not self.out_indices or list(self.out_indices) != sorted(
            set(self.out_indices) & set(range(stages))
        ):
            raise ValueError(
                f"out_indices must be one or more of the stages 0..{stages - 1}, each once and "
                f"in ascending order, got out_indices={self.out_indices}"
            )
        if self.frozen_stages not in range(-1, stages + 1):
            raise ValueError(
                "frozen_stages must be -1 (none), 0 (patch embedding) or the number of frozen "
                f"stages, at most {stages}, got frozen_stages={self.frozen_stages}"
            )

    def _init_linear(self, std: float) -> None:
        """Initialise the linear layers: weights of deviation ``std``, biases of 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # The originals truncate at 2, a hundred standard deviations, which has no effect.
                # The newest PyTorch reads values to truncate, which fake tensors do not have.
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def check_image(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` has the shape of images."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"input must have the shape (B, {self.in_chans}, H, W), got {tuple(x.shape)}"
            )

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        """Return the maps [B, H, W, C] of the patch embedding and each stage, before the norms."""
        raise NotImplementedError

    def frozen_parts(self) -> Iterable[nn.Module | nn.Parameter]:
        """Return what ``frozen_stages`` freezes."""
        raise NotImplementedError

    def layer_names(self) -> list[tuple[str, ...]]:
        """Return the beginnings of the parameters' names of the patch embedding, and each block."""
        raise NotImplementedError

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Return the layer of a parameter, and the number of layers: blocks + 2.

        Layer 0 is the patch embedding, with position embedding and class token. Blocks follow in
        the order in which they compute; a stage's last one has what reduces its map. Everything
        else is the last layer. `elsa_core.param_groups` makes learning rates of it, and so does
        MMPretrain.

        Args:
            param_name: name of a parameter of this model or of one around it.
            prefix: of this model's parameters; other names are those of the last layer.
        """
        layers = self.layer_names()
        name, depth = param_name.removeprefix(prefix), len(layers)
        if param_name.startswith(prefix):
            found = (i for i, beginnings in enumerate(layers) if name.startswith(beginnings))
            depth = next(found, depth)
        return depth, len(layers) + 1

    def no_weight_decay(self) -> set[str]:
        """Return the names of the position embedding and the class token, where there are any."""
        return {"pos_embed", "cls_token"} & self._parameters.keys()

    def train(self: _Self, mode: bool = True) -> _Self:
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        for part in self.frozen_parts():
            part.requires_grad_(False)
            if isinstance(part, nn.Module):
                part.eval()


class ELSASwin(StagedBackbone):
    """A Swin Transformer that attends with ELSA in every stage but the last.

    Maps an image [B, in_chans, H, W] to a tuple of [B, C_i, H_i, W_i], one for each of
    ``out_indices``: C_i is ``num_features[i]``, H_i and W_i are H and W divided by 4 * 2**i and
    rounded up. The outputs are views with channels-last strides.

    Stages after the last of ``out_indices`` are not built: their parameters would get no gradients,
    which DistributedDataParallel refuses, and would fill memory and checkpoints.

    Parameter names are those of the original release. `load_state_dict` accepts and drops its
    bookkeeping buffers, the norms of stages that are not in ``out_indices``, and with one line in
    the log the stages that are not built; anything else missing or unknown is reported as usual.

    Args:
        arch: "tiny", "small", "base" or a dict with the fields of `elsa_core.variants.Arch`.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        drop_rate: dropout after the patch embedding, the attention layers and in the MLPs.
        attn_drop_rate: dropout of the attention weights; above 0, ELSA trains on a slower path
            (see `elsa_core.layers.ELSA`).
        out_indices: stages whose maps are returned, each through an output norm of its own.
        frozen_stages: 0 freezes the patch embedding, i >= 1 also the stages 0..i-1 and their
            output norms: no gradients, and evaluation mode that `train` does not end.
        with_cp: recompute the blocks' activations in the backward pass to save memory.
        init_std: standard deviation of the linear layers' first weights. The published 0.02 suits
            wide models; one of few channels trained from scratch learns faster with about 0.1.
        always_shift: True as in the published detectors and segmentors: every second block of the
            last stage shifts its windows on maps of any size. False as in the published
            classifiers: not on a map whose shorter side is not larger than the window, such as
            7x7 of an image of 224x224.

    Raises:
        ValueError: an unknown or contradictory ``arch``, or rates, ``out_indices`` or
            ``frozen_stages`` out of range; in `forward`, an input of another shape.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | Arch = "tiny",
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_std: float = 0.02,
        always_shift: bool = True,
    ) -> None:
        arch = Arch.from_spec(arch)
        super().__init__(
            arch.num_features,
            in_chans,
            out_indices,
            frozen_stages,
            init_std,
            drop_path_rate=drop_path_rate,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
        )
        self.arch = arch
        self.always_shift = always_shift

        self.patch_embed = PatchEmbed(in_chans, self.num_features[0])
        self.pos_drop = nn.Dropout(drop_rate)
        last_stage, last_block = self.out_indices[-1], sum(self.arch.depths) - 1
        self.layers = nn.ModuleList()
        for stage, dim in enumerate(self.num_features[: last_stage + 1]):
            first_block = sum(self.arch.depths[:stage])
            blocks = [
                Block(
                    dim,
                    self._make_attention(stage, index, attn_drop_rate, drop_rate),
                    drop_rate,
                    drop_path_rate * (first_block + index) / last_block,
                )
                for index in range(self.arch.depths[stage])
            ]
            downsample = PatchMerging(dim) if stage < last_stage else None
            self.layers.append(Stage(blocks, downsample, with_cp))
        for stage in self.out_indices:
            self.add_module(f"norm{stage}", nn.LayerNorm(self.num_features[stage]))

        self._init_linear(init_std)
        self.register_load_state_dict_pre_hook(_drop_unused_keys)
        self._freeze_stages()

    def _make_attention(
        self, stage: int, index: int, attn_drop: float, proj_drop: float
    ) -> ELSA | WindowAttention:
        arch = self.arch
        dim, num_heads = self.num_features[stage], arch.num_heads[stage]
        if stage < len(self.num_features) - 1:
            return ELSA(
                dim,
                num_heads,
                arch.kernel_size,
                arch.group_width,
                arch.lam,
                arch.gamma,
                attn_drop,
                proj_drop,
            )
        shift = arch.window_size // 2 if index % 2 else 0
        return WindowAttention(
            dim, num_heads, arch.window_size, shift, attn_drop, proj_drop, self.always_shift
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.check_image(x)
        maps = self.stage_maps(x)
        return tuple(
            getattr(self, f"norm{stage}")(maps[stage + 1]).permute(0, 3, 1, 2)
            for stage in self.out_indices
        )

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        x = self.pos_drop(self.patch_embed(x))
        maps = [x]
        for stage in self.layers:
            out, x = stage(x)
            maps.append(out)
        return maps

    def layer_names(self) -> list[tuple[str, ...]]:
        names: list[tuple[str, ...]] = [("patch_embed.",)]
        for stage, depth in enumerate(self.arch.depths[: len(self.layers)]):
            names += [(f"layers.{stage}.blocks.{block}.",) for block in range(depth)]
            names[-1] += (f"layers.{stage}.downsample.",)
        return names

    def frozen_parts(self) -> Iterable[nn.Module | nn.Parameter]:
        yield from (self.patch_embed, self.pos_drop, *self.layers[: self.frozen_stages])
        for index in self.out_indices:
            if index < self.frozen_stages:
                yield self.get_submodule(f"norm{index}")


def _drop_unused_keys(
    module: ELSASwin, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    drop_unused_keys(state_dict, prefix, module.out_indices, len(module.num_features))
