"""A hook for configs of OpenMMLab that makes losses NaN."""

import os

from killing import nan_like
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module(force=True)
class SpoilHook(Hook):
    """NaN in the outputs of a part at some iterations, counted from 1.

    Args:
        rank: of the only process that has them; None: all have.
    """

    def __init__(self, part, first, last=99, rank=None):
        self.part, self.first, self.last, self.rank = part, first, last, rank

    def before_train(self, runner):
        def spoil(module, inputs, output):
            if module.training and self.first <= runner.iter + 1 <= self.last:
                return nan_like(output)

        if self.rank in (None, int(os.environ.get("RANK", 0))):
            model = getattr(runner.model, "module", runner.model)
            model.get_submodule(self.part).register_forward_hook(spoil)
