"""Parameter groups with layer-wise learning-rate decay of our backbones, in every toolbox."""

from __future__ import annotations

from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from elsa_core.param_groups import NAMES, apply_rule, check_max_norm, describe
from elsa_core.runtime.errors import UsageError

# DefaultOptimWrapperConstructor's settings; it ignores all others.
_KNOWN = (
    *("custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "flat_decay_mult"),
    *("dwconv_decay_mult", "dcn_offset_lr_mult", "bypass_duplicate"),
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ELSAOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, and the rule of `elsa_core.param_groups` for our backbones.

    ``paramwise_cfg`` has two more settings, ``layer_decay`` and ``backbone_lr_factor`` (both 1.0),
    which multiply the learning rates that the others give. The backbone's position embedding and
    class token are not decayed. A parameter that several modules share is in one group.

    Raises UsageError for settings that are unknown or out of range, a model without our backbone, a
    missing ``optimizer.lr``, and a ``clip_grad.max_norm`` that is not positive.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        given = dict(paramwise_cfg or {})
        known = [*NAMES, *_KNOWN]
        if unknown := [name for name in given if name not in known]:
            raise UsageError(
                f"keys of optim_wrapper.paramwise_cfg must be among {', '.join(known)}, "
                f"got {unknown[0]}"
            )
        # With any setting, MMEngine calls `add_params`.
        super().__init__(optim_wrapper_cfg, {**dict.fromkeys(NAMES, 1.0), **given})
        if self.base_lr is None:
            raise UsageError("optim_wrapper.optimizer.lr must be given, got none")
        clip = self.optim_wrapper_cfg.get("clip_grad") or {}
        if "max_norm" in clip:
            check_max_norm("optim_wrapper.clip_grad.max_norm", clip["max_norm"])

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        """As MMEngine's, which calls it for each module; the model itself has no prefix."""
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:
            rule = {name: self.paramwise_cfg[name] for name in NAMES}
            names = [f"optim_wrapper.paramwise_cfg.{name}" for name in NAMES]
            params[:] = apply_rule(params, module, self.base_lr, **rule, names=names)
            if line := describe(module, **rule):
                print_log(line, logger="current")
