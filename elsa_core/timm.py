"""Register ELSA-Swin in timm: ``import elsa_core.timm``, then ``timm.create_model``.

`elsa_swin_tiny`, `elsa_swin_small` and `elsa_swin_base` are classifiers, with the parameter names
of the original ImageNet checkpoints; with ``features_only=True`` they are the backbone, with those
of `elsa_core.ELSASwin`. Besides timm's own arguments both take ``arch`` for a custom architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import (
    FeatureInfo,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn

from . import backbone
from .checkpoint import drop_unused_keys
from .variants import VARIANTS, Arch

MATCH_PREVIOUS_GROUP = (99999,)  # timm's word for: in the group of the parameters before


def _feature_info(arch: Arch) -> list[dict[str, Any]]:
    return [
        {"num_chs": channels, "reduction": 4 * 2**stage, "module": f"layers.{stage}"}
        for stage, channels in enumerate(arch.num_features)
    ]


def _stages(indices: int | Sequence[int] | None, number: int) -> tuple[int, ...]:
    """Return stage indices; they may be negative, or one number for that many last stages."""
    if indices is None:
        return tuple(range(number))
    if isinstance(indices, int):
        indices = range(-indices, 0)
    return tuple(index + number if -number <= index < 0 else index for index in indices)


class _Training(nn.Module):
    """Methods that timm's training script calls on a model."""

    layers: nn.ModuleList

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns for the layers of `StagedBackbone.get_layer_depth`."""
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", MATCH_PREVIOUS_GROUP),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        stages: Iterable[Any] = self.layers
        for stage in stages:
            stage.with_cp = enable


class ELSASwin(_Training):
    """The published classifier (arXiv 2112.12786): [B, in_chans, H, W] -> [B, num_classes].

    Images may have any size. As in the original, small maps are not shifted (``always_shift``).
    No parameter is exempt from weight decay but those that timm exempts in every model: the
    published training decays position biases and ghost filters.

    Args:
        arch: see `elsa_core.ELSASwin`.
        num_classes: 0 for the pooled features [B, C].
        global_pool: timm's name of the pooling; "" for maps [B, H, W, C], without a classifier.
        img_size: accepted, since timm's users name it; nothing depends on it.
        drop_rate: dropout before the classifier.
        proj_drop_rate, attn_drop_rate, drop_path_rate: as the backbone's ``drop_rate``,
            ``attn_drop_rate`` and ``drop_path_rate``.
    """

    output_fmt = "NHWC"
    global_pool: Any
    head: nn.Module

    def __init__(
        self,
        arch: str | Mapping[str, Any] | Arch = "tiny",
        num_classes: int = 1000,
        global_pool: str = "avg",
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        always_shift: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.arch = Arch.from_spec(arch)
        self.last_stage = len(self.arch.depths) - 1
        parts = backbone.ELSASwin(
            self.arch,
            in_chans,
            drop_path_rate,
            proj_drop_rate,
            attn_drop_rate,
            out_indices=(self.last_stage,),
            always_shift=always_shift,
        )
        self.patch_embed, self.pos_drop = parts.patch_embed, parts.pos_drop
        self.layers = parts.layers
        self.norm = parts.get_submodule(f"norm{self.last_stage}")
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = self.arch.num_features[-1]
        self.feature_info = _feature_info(self.arch)
        self.reset_classifier(num_classes, global_pool)
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.to(device=device, dtype=dtype)
        self.register_load_state_dict_pre_hook(_drop_unused_keys)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling unless ``global_pool`` is None."""
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, global_pool, input_fmt=self.output_fmt
        )
        weight = self.patch_embed.proj.weight
        self.head.to(weight.device, weight.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the normalised last map [B, H, W, C] and the maps after the stages in ``indices``.

        Args:
            indices: stages, from the end if negative; an integer means that many last stages.
            norm: normalise the last stage's map in the list, too.
            stop_early: skip the stages after the last of ``indices``; the last map is then that
                stage's.
            output_fmt: "NCHW" or "NHWC", layout of the maps in the list.
            intermediates_only: return only the list.
        """
        wanted = _stages(indices, len(self.layers))
        if not wanted or not set(wanted) <= set(range(len(self.layers))):
            raise ValueError(
                f"indices must be among the stages 0..{len(self.layers) - 1}, got {indices}"
            )
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt}")
        last = max(wanted) if stop_early else len(self.layers) - 1
        x = self.pos_drop(self.patch_embed(x))
        maps = []
        for index, stage in enumerate(self.layers[: last + 1]):
            out, x = stage(x)
            if index == self.last_stage:
                x = self.norm(out)
            if index in wanted:
                out = x if norm and index == self.last_stage else out
                maps.append(out.permute(0, 3, 1, 2) if output_fmt == "NCHW" else out)
        x = x if last == self.last_stage else out
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> tuple[int, ...]:
        """Remove layers that the maps of ``indices`` do not need. Return indices from the start."""
        wanted = _stages(indices, len(self.layers))
        self.layers = self.layers[: max(wanted) + 1]
        if prune_norm or len(self.layers) <= self.last_stage:
            self.norm = nn.Identity()
            self.num_features = self.feature_info[max(wanted)]["num_chs"]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the last stage's normalised map [B, H/32, W/32, C]."""
        x = self.pos_drop(self.patch_embed(x))
        for stage in self.layers:
            x = stage(x)[1]
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, H, W, C] -> [B, num_classes], or the classifier's input if ``pre_logits``."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _drop_unused_keys(
    module: ELSASwin, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    stages = len(module.arch.depths)
    drop_unused_keys(state_dict, prefix, (module.last_stage,), stages)


class ELSASwinFeatures(backbone.ELSASwin, _Training):
    """`elsa_core.ELSASwin` for timm's ``features_only=True``.

    Returns a list of maps [B, C, H, W], each through its output norm as in detectors and
    segmentors; ``feature_info`` has their channels and strides. ``drop_rate``, of a classifier,
    is accepted like ``img_size``; ``options`` are the backbone's.
    """

    output_fmt = "NCHW"
    num_classes = 0

    def __init__(
        self,
        arch: str | Mapping[str, Any] | Arch = "tiny",
        in_chans: int = 3,
        out_indices: int | Sequence[int] | None = None,
        img_size: int | Sequence[int] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        arch = Arch.from_spec(arch)
        stages = _stages(out_indices, len(arch.depths))
        super().__init__(arch, in_chans, drop_rate=proj_drop_rate, out_indices=stages, **options)
        self.feature_info = FeatureInfo(_feature_info(arch), stages)
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return list(super().forward(x))


def _filter_checkpoint(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a model's tensors from a checkpoint of the original release, of a backbone or of timm.

    Raises ValueError if more than output norms and classifier are missing.
    """
    for container in ("state_dict", "model"):
        state_dict = state_dict.get(container, state_dict)
    if isinstance(model, ELSASwinFeatures):
        state_dict = {name: t for name, t in state_dict.items() if not name.startswith("head.")}
        norm = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith("norm.")}
        last = len(model.arch.depths) - 1
        if model.out_indices == (last,):  # else new norms, as in `elsa_core.weights.load_backbone`
            state_dict |= {name.replace("norm", f"norm{last}"): t for name, t in norm.items()}
    needed = [name for name in model.state_dict() if name.startswith(("patch_embed.", "layers."))]
    if missing := [name for name in needed if name not in state_dict]:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the {len(needed)} tensors of the backbone, "
            f"such as {missing[0]}: it must have the original release's names, which "
            "'convert_weights.py --to original' writes"
        )
    return state_dict


def _cfg() -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": 1000,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2112.12786",
    }


default_cfgs = generate_default_cfgs({f"elsa_swin_{name}": _cfg() for name in VARIANTS})


def _create(variant: str, pretrained: bool, features_only: bool = False, **kwargs: Any) -> Any:
    kwargs = {"arch": variant, **kwargs}
    maps = features_only and "feature_cls" not in kwargs
    if features_only and not maps:  # timm's own extraction, of maps without output norms
        if kwargs["feature_cls"] != "getter":
            raise ValueError(f"feature_cls must be 'getter', got {kwargs['feature_cls']!r}")
        depths = Arch.from_spec(kwargs["arch"]).depths
        indices = _stages(kwargs.get("out_indices"), len(depths))
        kwargs |= {"features_only": True, "out_indices": indices}
    model = build_model_with_cfg(
        ELSASwinFeatures if maps else ELSASwin,
        f"elsa_swin_{variant}",
        pretrained,
        pretrained_filter_fn=_filter_checkpoint,
        kwargs_filter=("num_classes", "global_pool") if maps else None,
        **kwargs,
    )
    if maps:
        for name in ("num_classes", "classifier"):
            model.pretrained_cfg.pop(name)
    return model


@register_model
def elsa_swin_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    return _create("tiny", pretrained, **kwargs)


@register_model
def elsa_swin_small(pretrained: bool = False, **kwargs: Any) -> Any:
    return _create("small", pretrained, **kwargs)


@register_model
def elsa_swin_base(pretrained: bool = False, **kwargs: Any) -> Any:
    return _create("base", pretrained, **kwargs)
