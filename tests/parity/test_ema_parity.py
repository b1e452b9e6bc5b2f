"""Averaged weights, best checkpoint and early stop: the same in both frameworks."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmengine")

from detectron2.engine import TrainerBase
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop

from elsa_core.ema import AveragedWeights
from elsa_d2 import AtomicCheckpointer
from elsa_d2.engine.ema import AveragedWeightsHook as HookOfDetectron2
from elsa_mm import AveragedWeightsHook

STEPS, ACCUMULATED = 6, 2


def model_and_optimizer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).double()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def parts(step):
    """Inputs of a step of the optimizer, as often as gradients are accumulated."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ACCUMULATED, 5, 4, generator=generator, dtype=torch.double)


def in_detectron2(folder):
    class Training(TrainerBase):
        def run_step(self):
            optimizer.zero_grad()
            for part in parts(self.iter):
                (model(part).square().mean() / ACCUMULATED).backward()
            optimizer.step()

        def after_step(self):
            super().after_step()
            seen.append(state(checkpointer.averaged))

    seen, (model, optimizer) = [], model_and_optimizer()
    checkpointer = AtomicCheckpointer(model, str(folder))
    checkpointer.averaged = AveragedWeights(model, 0.6, 3)
    training = Training()
    training.register_hooks([HookOfDetectron2(checkpointer, optimizer)])
    training.train(0, STEPS)
    return seen


def in_mmengine():
    seen, (model, optimizer) = [], model_and_optimizer()
    wrapper = OptimWrapper(optimizer, accumulative_counts=ACCUMULATED)
    wrapper.initialize_count_status(model, 0, STEPS * ACCUMULATED)
    loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper, _train_loop=loop)
    hook = AveragedWeightsHook(0.6, 3)
    hook.before_run(runner)
    hook.before_train(runner)
    for step in range(STEPS):
        for part in parts(step):
            wrapper.update_params(model(part).square().mean())
            hook.after_train_iter(runner, 0)
        seen.append(state(hook.ema_model))
    return seen


def state(averaged):
    return {name: tensor.clone() for name, tensor in averaged.state_dict().items()}


def test_the_averages_are_equal_after_each_step(tmp_path):
    first, second = in_detectron2(tmp_path), in_mmengine()
    assert len(first) == len(second) == STEPS == first[-1]["n_averaged"]
    for ours, theirs in zip(first, second, strict=True):
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-12)
    assert not torch.equal(first[0]["module.0.weight"], first[-1]["module.0.weight"])
