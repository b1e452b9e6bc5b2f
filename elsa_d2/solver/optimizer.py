"""AdamW with the parameter groups of the published recipe."""

from __future__ import annotations

from typing import Any

import detectron2.solver
import torch
from detectron2.config import CfgNode
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from torch import nn

from elsa_core.backbone import StagedBackbone
from elsa_core.runtime.errors import UsageError

OPTIMIZERS = ("AdamW", "SGD")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds SOLVER.OPTIMIZER: "AdamW", or Detectron2's "SGD"."""
    if cfg.SOLVER.OPTIMIZER not in OPTIMIZERS:
        raise UsageError(
            f"SOLVER.OPTIMIZER must be one of {', '.join(OPTIMIZERS)}, got {cfg.SOLVER.OPTIMIZER!r}"
        )
    if cfg.SOLVER.OPTIMIZER == "SGD":
        return detectron2.solver.build_optimizer(cfg, model)
    adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return adamw(parameter_groups(cfg, model), lr=cfg.SOLVER.BASE_LR, betas=cfg.SOLVER.BETAS)


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Returns Detectron2's groups, without decay for what SOLVER.WEIGHT_DECAY_EXEMPT names.

    The original recipe exempts every parameter whose name contains "norm". In its model only the
    backbone has such names; the normalisation layers of neck and heads are named "bn" and decayed.
    Detectron2 names them "norm", too, hence the restriction to the backbone. They keep
    SOLVER.WEIGHT_DECAY_NORM, which must be None to decay them as in the recipe.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    exempt = [
        parameter
        for module in model.modules()
        if isinstance(module, StagedBackbone)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and any(part in name for part in solver.WEIGHT_DECAY_EXEMPT)
    ]
    return reduce_param_groups([*groups, {"params": exempt, "weight_decay": 0.0}])
