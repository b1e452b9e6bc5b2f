"""The lengths of the published trainings: epochs of COCO's 117,266 annotated images in batches of
16, and when the learning rate falls to a tenth."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

EPOCH = 7330


def _multiplier(*epochs):
    """Args: epochs: those after which the rate falls, and their number in all."""
    iterations = [epoch * EPOCH for epoch in epochs]
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.1**2], milestones=iterations),
        warmup_factor=0.001,
        warmup_length=500 / iterations[-1],
    )


lr_multiplier_1x = _multiplier(8, 11, 12)
lr_multiplier_3x = _multiplier(27, 33, 36)
