"""Averages of a model's weights."""

import copy
import math

import pytest
import torch
from torch import nn

from elsa_core.ema import AveragedWeights
from elsa_core.runtime.finite import FiniteWatch
from elsa_core.weights.averages import BESIDE, note, trained


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.free, self.frozen = (nn.Parameter(torch.randn(3, dtype=torch.double)) for _ in "12")
        self.frozen.requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("constant", torch.ones(2), persistent=False)


def step(model, optimizer, gradient):
    model.free.grad = torch.full_like(model.free, gradient)
    optimizer.step()
    optimizer.zero_grad()
    model.count += 1


def training(**options):
    torch.manual_seed(0)
    model = Model()
    averaged, optimizer = AveragedWeights(model, **options), torch.optim.AdamW(model.parameters())
    averaged.follow(optimizer)
    return model, averaged, optimizer


@pytest.mark.parametrize("decay, warmup", [(0.999, 10), (0.4, 3), (0.5, 0), (0.0, 10)])
def test_the_average_is_that_of_its_rule(decay, warmup):
    model, averaged, optimizer = training(decay=decay, warmup=warmup)
    frozen, expected = model.frozen.clone(), 0
    for k in range(8):
        step(model, optimizer, math.sin(k))
        averaged.update(model)
        averaged.update(model)  # without a step in between
        weight = min(decay, k / (k + warmup)) if k else 0
        expected = weight * expected + (1 - weight) * model.free.detach()
        torch.testing.assert_close(averaged.module.free, expected, rtol=0, atol=1e-15)
        assert torch.equal(averaged.module.frozen, frozen)
        assert averaged.module.count == k + 1 == averaged.n_averaged


@pytest.mark.parametrize("first", [True, False])
def test_skipped_steps_change_nothing(first):
    """Whichever of the hooks on the optimizer comes first."""
    torch.manual_seed(0)
    model, watch = Model(), FiniteWatch()
    averaged, optimizer = AveragedWeights(model), torch.optim.AdamW(model.parameters())
    for register in (averaged.follow, watch.guard) if first else (watch.guard, averaged.follow):
        register(optimizer)
    step(model, optimizer, 1.0)
    averaged.update(model)
    before = copy.deepcopy(averaged.state_dict())
    step(model, optimizer, math.nan)
    averaged.update(model)
    after = averaged.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_loss_scaling_skips_no_average_but_those_of_skipped_steps():
    model, averaged, optimizer = training()
    scaler = torch.amp.GradScaler("cpu")
    for factor in (1.0, math.inf, 1.0):
        scaler.scale((model.free * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        averaged.update(model)
    assert averaged.n_averaged == 2


@pytest.mark.parametrize("of_mmengine", [True, False])
def test_saved_and_restored(of_mmengine):
    model, averaged, optimizer = training()
    for gradient in (1.0, -2.0):
        step(model, optimizer, gradient)
        averaged.update(model)
    weights, rest = copy.deepcopy(averaged.weights_and_rest(model))
    assert not torch.equal(weights["free"], rest["module.free"])
    raw = trained({BESIDE: rest})
    assert raw.keys() == weights.keys() and torch.equal(raw["free"], model.free)
    if of_mmengine:
        rest["steps"] = rest.pop("n_averaged")
    other = AveragedWeights(Model())
    other.load(weights, rest)
    again = Model()
    again.load_state_dict(raw)
    other.begin(again)  # changes nothing
    for one, source in ((averaged, model), (other, again)):
        one.update_parameters(source)
    assert torch.equal(other.module.free, averaged.module.free) and other.n_averaged == 3


def test_before_the_first_step_the_average_is_the_model():
    averaged, model = AveragedWeights(Model()), Model()
    averaged.begin(model)
    assert torch.equal(averaged.module.free, model.free)
    assert not averaged.module.free.requires_grad


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(decay=1.0), r"decay of the averaged weights must be in \[0, 1\), got 1.0"),
        (dict(decay=math.nan), r"in \[0, 1\), got nan"),
        (dict(warmup=-1), "warm-up of the averaged weights must be 0 or more, got -1"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        AveragedWeights(nn.Identity(), **options)


def test_the_sentence_on_a_file_with_both():
    sentence = "a.pth holds averaged (EMA) weights and the optimizer's: the "
    assert note("a.pth", averaged=True) == sentence + "averaged ones are read"
    assert note("a.pth", averaged=False) == sentence + "optimizer's are read"
