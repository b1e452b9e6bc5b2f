"""ELSA-Swin in Hugging Face transformers (4.57 and later): config, backbone, classifier.

Importing this registers them with `AutoConfig`, `AutoModel`, `AutoBackbone` and
`AutoModelForImageClassification`. In each model ``elsa_swin`` is an `elsa_core.ELSASwin`, with its
parameter names. ``elsa_core.weights.load_backbone(model.elsa_swin, path)`` loads any checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import can_return_tuple

try:
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
except ImportError:  # transformers 4
    from transformers.utils.backbone_utils import BackboneConfigMixin, BackboneMixin

from .backbone import ELSASwin
from .layers import ELSA, WindowAttention
from .variants import Arch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ElsaSwinConfig(BackboneConfigMixin, PretrainedConfig):
    """Configuration of an ELSA-Swin; the defaults are ELSA-Swin-T.

    As in transformers' Swin, ``stage1`` is the first stage, with index 1. The maps of ``stem`` are
    not among a backbone's features.

    Args:
        arch: "tiny", "small", "base" or a dict, see `elsa_core.ELSASwin`.
        num_channels: of the image.
        drop_path_rate, hidden_dropout_prob, attention_probs_dropout_prob: `elsa_core.ELSASwin`'s
            ``drop_path_rate``, ``drop_rate`` and ``attn_drop_rate``.
        initializer_range: standard deviation of the linear layers' first weights.
        always_shift: see `elsa_core.ELSASwin`. None: True for a backbone, False for a classifier,
            as published.
        out_features, out_indices: a backbone's maps, as names or indices; None: the last.
        options: those of `PretrainedConfig`, such as ``num_labels`` or ``id2label``.

    Raises:
        ValueError: an unknown or contradictory ``arch``, or stages that it does not have.
    """

    model_type = "elsa_swin"

    def __init__(
        self,
        arch: str | Mapping[str, Any] | Arch = "tiny",
        num_channels: int = 3,
        drop_path_rate: float = 0.0,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        always_shift: bool | None = None,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        parts = Arch.from_spec(arch)
        self.arch = arch if isinstance(arch, str) else asdict(parts)
        self.num_channels = num_channels
        self.drop_path_rate = drop_path_rate
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.initializer_range = initializer_range
        self.always_shift = always_shift
        self._out_indices = self.find_stages(out_features, out_indices)
        self._out_features = [self.stage_names[index] for index in self._out_indices]
        super().__init__(**options)

    def find_stages(self, names: Sequence[str] | None, indices: Sequence[int] | None) -> list[int]:
        """Return indices into `stage_names` of a backbone's maps. ValueError for other stages."""
        known = self.stage_names
        if indices is not None:
            found = [index + len(known) if index < 0 else index for index in indices]
        else:
            found = [known.index(n) if n in known else 0 for n in names or known[-1:]]
        if not found or found != sorted(set(found) & set(range(1, len(known)))):
            raise ValueError(
                f"a backbone's features must be among {', '.join(known[1:])} (indices "
                f"1..{len(known) - 1}), each once and in this order, got "
                f"{list(names if indices is None else indices)}"  # type: ignore[arg-type]
            )
        if names is not None and list(names) != [known[index] for index in found]:
            raise ValueError(
                f"out_features and out_indices must name the same stages, got {list(names)} and "
                f"{found}"
            )
        return found

    @property
    def num_features(self) -> list[int]:
        """Channels of each stage."""
        return Arch.from_spec(self.arch).num_features

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.num_features[-1]

    @property
    def stage_names(self) -> list[str]:
        return ["stem", *(f"stage{index + 1}" for index in range(len(self.num_features)))]


class ElsaSwinPreTrainedModel(PreTrainedModel):
    config_class = ElsaSwinConfig
    base_model_prefix = "elsa_swin"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    elsa_swin: ELSASwin

    def _make(self, out_indices: Sequence[int], always_shift: bool) -> ELSASwin:
        config = self.config
        return ELSASwin(
            config.arch,
            in_chans=config.num_channels,
            drop_path_rate=config.drop_path_rate,
            drop_rate=config.hidden_dropout_prob,
            attn_drop_rate=config.attention_probs_dropout_prob,
            out_indices=out_indices,
            init_std=config.initializer_range,
            always_shift=always_shift if config.always_shift is None else config.always_shift,
        )

    def _make_classifier(self) -> ELSASwin:
        return self._make((len(self.config.num_features) - 1,), always_shift=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a checkpoint does not have, as `ELSASwin` does."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ELSA):  # which writes to parts of a parameter
            if not getattr(module.ghost_head, "_is_hf_initialized", False):
                module.reset_parameters()
        elif isinstance(module, (nn.Conv2d, nn.LayerNorm, WindowAttention)):
            module.reset_parameters()

    @property
    def gradient_checkpointing(self) -> bool:
        return any(stage.with_cp for stage in self.elsa_swin.layers)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        stages: Iterable[Any] = self.elsa_swin.layers
        for stage in stages:
            stage.with_cp = enable

    def _run(
        self, pixel_values: Tensor, output_hidden_states: bool | None
    ) -> tuple[dict[int, Tensor], tuple[Tensor, ...] | None]:
        """Return the normalised maps [B, C, H, W] by stage, and all hidden maps if requested."""
        core = self.elsa_swin
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not output_hidden_states:
            return dict(zip(core.out_indices, core(pixel_values), strict=True)), None
        maps = core.stage_maps(pixel_values)
        normalised = {
            stage: core.get_submodule(f"norm{stage}")(maps[stage + 1]).permute(0, 3, 1, 2)
            for stage in core.out_indices
        }
        return normalised, tuple(one.permute(0, 3, 1, 2) for one in maps)


class ElsaSwinModel(ElsaSwinPreTrainedModel):
    """Features of the published classifiers, without a head.

    ``last_hidden_state`` [B, H/32 * W/32, C] is the last stage's normalised map, row after row,
    ``pooler_output`` [B, C] its mean; ``hidden_states`` are the maps [B, C, H, W] of the patch
    embedding and of each stage.
    """

    def __init__(self, config: ElsaSwinConfig) -> None:
        super().__init__(config)
        self.elsa_swin = self._make_classifier()
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPooling:
        maps, hidden_states = self._run(pixel_values, output_hidden_states)
        tokens = next(iter(maps.values())).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(tokens, tokens.mean(1), hidden_states)


class ElsaSwinForImageClassification(ElsaSwinPreTrainedModel):
    """The published classifier: the mean of the last stage's normalised map, and a linear layer.

    ``logits`` [B, num_labels]; ``loss`` where ``labels`` [B] are given.
    """

    def __init__(self, config: ElsaSwinConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.elsa_swin = self._make_classifier()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention:
        maps, hidden_states = self._run(pixel_values, output_hidden_states)
        logits = self.classifier(next(iter(maps.values())).mean((2, 3)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss, logits, hidden_states)


class ElsaSwinBackbone(BackboneMixin, ElsaSwinPreTrainedModel):
    """`elsa_core.ELSASwin` for the models of transformers that take a backbone.

    ``feature_maps``: [B, C, H, W] of the stages in ``config.out_features``, each through its output
    norm.
    """

    has_attentions = False

    def __init__(self, config: ElsaSwinConfig) -> None:
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # transformers 4
            self._init_backbone(config)
        self.num_features = [config.num_features[0], *config.num_features]
        stages = [index - 1 for index in config.find_stages(None, config.out_indices)]
        self.elsa_swin = self._make(stages, always_shift=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None
    ) -> BackboneOutput:
        maps, hidden_states = self._run(pixel_values, output_hidden_states)
        if not {index - 1 for index in self.out_indices} <= set(maps):
            raise ValueError(
                f"out_features must be among those that the backbone was made with, "
                f"{[self.stage_names[stage + 1] for stage in maps]}, got {self.out_features}"
            )
        return BackboneOutput(tuple(maps[index - 1] for index in self.out_indices), hidden_states)


def make_image_processor(**changes: Any) -> ConvNextImageProcessor:
    """Return the image processor of the published classifiers, to save beside a model.

    The shorter side is resized to 248 pixels, then the middle 224x224 pixels are cropped; RGB with
    ImageNet's mean and standard deviation. ``changes``: other arguments of
    `ConvNextImageProcessor`.
    """
    options: dict[str, Any] = {
        "size": {"shortest_edge": 224},
        "crop_pct": 0.9,
        "resample": PILImageResampling.BICUBIC,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    return ConvNextImageProcessor(**{**options, **changes})


AutoConfig.register(ElsaSwinConfig.model_type, ElsaSwinConfig, exist_ok=True)
AutoModel.register(ElsaSwinConfig, ElsaSwinModel, exist_ok=True)
AutoBackbone.register(ElsaSwinConfig, ElsaSwinBackbone, exist_ok=True)
AutoModelForImageClassification.register(
    ElsaSwinConfig, ElsaSwinForImageClassification, exist_ok=True
)
