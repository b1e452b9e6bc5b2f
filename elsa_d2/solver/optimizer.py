"""AdamW with the parameter groups of the published recipe."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import detectron2.solver
import torch
from detectron2.config import CfgNode
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from elsa_core.backbone import StagedBackbone
from elsa_core.param_groups import NAMES, apply_rule, check_max_norm, describe
from elsa_core.runtime.errors import UsageError

logger = logging.getLogger(__name__)
OPTIMIZERS = ("AdamW", "SGD")
CLIP_TYPES = ("value", "norm", "full_model")
_RULE = ("SOLVER.LAYER_DECAY", "SOLVER.BACKBONE_LR_FACTOR")
# Norms: those of ELSA-VOLO's stem are not called so.
UNDECAYED = ("norm", *(f"patch_embed.conv.{index}." for index in (1, 4, 7)))


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds SOLVER.OPTIMIZER: "AdamW", or Detectron2's "SGD".

    With SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model" it clips gradients by `clip_total_norm`.
    """
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    if solver.OPTIMIZER not in OPTIMIZERS:
        raise UsageError(
            f"SOLVER.OPTIMIZER must be one of {', '.join(OPTIMIZERS)}, got {solver.OPTIMIZER!r}"
        )
    if clip.CLIP_TYPE not in CLIP_TYPES:
        raise UsageError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be one of {', '.join(CLIP_TYPES)}, "
            f"got {clip.CLIP_TYPE!r}"
        )
    if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
        return _build_optimizer(cfg, model)
    check_max_norm("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", clip.CLIP_VALUE)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    optimizer = _build_optimizer(cfg, model)
    clip_total_norm(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer


def _build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        if solver.LAYER_DECAY != 1 or solver.BACKBONE_LR_FACTOR != 1:
            raise UsageError(f"{' and '.join(_RULE)} need SOLVER.OPTIMIZER AdamW, got SGD")
        return detectron2.solver.build_optimizer(cfg, model)
    groups = parameter_groups(
        model,
        solver.BASE_LR,
        solver.WEIGHT_DECAY,
        exempt=solver.WEIGHT_DECAY_EXEMPT,
        layer_decay=solver.LAYER_DECAY,
        backbone_lr_factor=solver.BACKBONE_LR_FACTOR,
        names=_RULE,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if line := describe(model, solver.LAYER_DECAY, solver.BACKBONE_LR_FACTOR):
        logger.info(line)
    adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return adamw(groups, lr=solver.BASE_LR, betas=solver.BETAS)


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    weight_decay: float,
    exempt: Iterable[str] = UNDECAYED,
    layer_decay: float = 1.0,
    backbone_lr_factor: float = 1.0,
    names: Sequence[str] = NAMES,
    **options: Any,
) -> list[dict[str, Any]]:
    """Returns Detectron2's groups by the rule of `elsa_core.param_groups`.

    The original recipe decays no parameter whose name contains "norm". In its model only the
    backbone has such names; the normalisation layers of neck and heads are named "bn" and decayed.
    Detectron2 names them "norm", too, hence the restriction to the backbone. They keep
    ``weight_decay_norm``, which must be None to decay them as in the recipe.

    Args:
        exempt: parameters of the backbone whose name contains one of these are not decayed,
            besides those of its `no_weight_decay`.
        layer_decay, backbone_lr_factor, names: as in `elsa_core.param_groups.lr_factors`.
        options: other arguments of Detectron2's `get_default_optimizer_params`.
    """
    groups = get_default_optimizer_params(model, base_lr, weight_decay, **options)
    exempt = tuple(exempt)
    undecayed = [
        parameter
        for module in model.modules()
        if isinstance(module, StagedBackbone)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and any(part in name for part in exempt)
    ]
    groups = reduce_param_groups([*groups, {"params": undecayed, "weight_decay": 0.0}])
    rule = {"layer_decay": layer_decay, "backbone_lr_factor": backbone_lr_factor, "names": names}
    return reduce_param_groups(apply_rule(groups, model, base_lr, **rule))


def clip_total_norm(
    optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0
) -> None:
    """Makes the optimizer clip the norm of all gradients together, and log it as "grad_norm".

    That is what MMEngine's ``clip_grad=dict(max_norm=...)`` does. Detectron2's CLIP_TYPE "norm"
    clips the gradient of each parameter by itself. GradScaler has unscaled the gradients by then.
    """

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type).item()
        if has_event_storage() and math.isfinite(norm):
            get_event_storage().put_scalar("grad_norm", norm)

    optimizer.register_step_pre_hook(clip)
