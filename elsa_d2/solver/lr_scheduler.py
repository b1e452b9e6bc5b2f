"""Learning rate schedules: Detectron2's, and the polynomial one of segmentation recipes."""

from __future__ import annotations

import logging

import detectron2.solver
import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler

logger = logging.getLogger(__name__)
POLY = "WarmupPolyLR"


class WarmupPoly(ParamScheduler):
    """Factor of the learning rate: polynomial decay times linear warm-up.

    Iteration i has end_value + (1 - end_value) * (1 - i / max_iter) ** power. The first
    ``warmup_iters`` are multiplied by warmup_factor + (1 - warmup_factor) * i / warmup_iters, as
    MMCV 1 does in the original recipe. The iteration after the last one would have the end value.

    Args:
        max_iter: iterations of the training.
        warmup_iters: iterations of the warm-up; a shorter training is warm-up throughout.
        warmup_factor: factor of the first iteration.
        power: power of the decay.
        end_value: factor at ``max_iter``.
    """

    def __init__(
        self,
        max_iter: int,
        warmup_iters: int = 0,
        warmup_factor: float = 0.0,
        power: float = 1.0,
        end_value: float = 0.0,
    ) -> None:
        self.max_iter, self.warmup_iters = max_iter, warmup_iters
        self.warmup_factor, self.power, self.end_value = warmup_factor, power, end_value

    def __call__(self, where: float) -> float:
        """Returns the factor at iteration ``where`` * max_iter, 0 <= ``where`` <= 1."""
        iteration = round(where * self.max_iter)
        left = (self.max_iter - iteration) / self.max_iter
        factor = self.end_value + (1 - self.end_value) * left**self.power
        if iteration < self.warmup_iters:
            done = iteration / self.warmup_iters
            factor *= self.warmup_factor + (1 - self.warmup_factor) * done
        return factor


def build_lr_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Builds SOLVER.LR_SCHEDULER_NAME: "WarmupPolyLR", or a scheduler of Detectron2's."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != POLY:
        return detectron2.solver.build_lr_scheduler(cfg, optimizer)
    factor = WarmupPoly(
        solver.MAX_ITER,
        solver.WARMUP_ITERS,
        solver.WARMUP_FACTOR,
        solver.POLY_LR_POWER,
        solver.BASE_LR_END / solver.BASE_LR,
    )
    return LRMultiplier(optimizer, factor, solver.MAX_ITER)


def scale_lr(cfg: CfgNode) -> CfgNode:
    """Scales SOLVER.BASE_LR and BASE_LR_END by IMS_PER_BATCH / BASE_BATCH_SIZE.

    Returns a new config, with BASE_BATCH_SIZE 0, if they change.
    """
    solver = cfg.SOLVER
    if not solver.BASE_BATCH_SIZE:
        return cfg
    factor = solver.IMS_PER_BATCH / solver.BASE_BATCH_SIZE
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.BASE_LR_END = (
        solver.BASE_LR * factor,
        solver.BASE_LR_END * factor,
    )
    cfg.SOLVER.BASE_BATCH_SIZE = 0
    logger.info(
        f"SOLVER.BASE_LR {cfg.SOLVER.BASE_LR:g} for batches of {solver.IMS_PER_BATCH}, "
        f"from {solver.BASE_LR:g} for {solver.BASE_BATCH_SIZE}"
    )
    cfg.freeze()
    return cfg
