"""Losses, gradients and parameters that are NaN or infinite."""

import math

import pytest
import torch
from torch import nn

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.finite import FiniteWatch, all_finite, first_nonfinite, not_finite, spoilt

NAN, INF = math.nan, math.inf


class Training:
    """One parameter of value 1, whose loss in each iteration is its product with a factor."""

    def __init__(self, limit=3, dtype="float32", scale=4.0):
        self.weight = nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == "float16")
        self.watch = FiniteWatch(limit)
        self.watch.guard(self.optimizer, self.scaler)

    def step(self, factor, gradient=1.0):
        self.optimizer.zero_grad()
        loss = self.weight * factor
        self.scaler.scale(loss).backward()
        self.weight.grad *= gradient
        self.scaler.step(self.optimizer)
        self.scaler.update()
        bad = not_finite({"loss": loss})
        return self.watch.count(bad, bool(bad))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bad_iterations_change_nothing_and_end_the_training(dtype):
    training = Training(dtype=dtype)
    assert training.step(1.0) == "" and not training.watch.bad
    before = training.weight.item(), str(training.optimizer.state_dict())
    assert training.step(NAN) == "loss is nan (1 in a row, 3 end the training)"
    assert training.step(INF).startswith("loss is inf (2 in a row")
    assert (training.weight.item(), str(training.optimizer.state_dict())) == before
    assert training.watch.bad and not training.watch.at_limit
    training.step(1.0)
    assert training.weight.item() < before[0]
    assert not training.watch.bad and training.watch.recovered
    for _ in range(3):
        assert not training.watch.at_limit
        training.step(NAN)
    assert training.watch.at_limit
    end = training.watch.ended(7, "out/a.pth")
    assert end.code == 1 and end.sentence == (
        "training ended at iteration 7 after 3 iterations in a row with losses that are not finite "
        "(loss is nan); the last finite checkpoint is out/a.pth"
    )


def test_gradients_of_finite_losses():
    training = Training(limit=2)
    assert training.step(1.0, NAN) == "a gradient is not finite (1 in a row, 2 end the training)"
    assert training.weight == 1 and not training.optimizer.state
    training.step(1.0, INF)
    assert training.watch.at_limit
    sentence = training.watch.ended(2, None).sentence
    assert "2 steps in a row with gradients that are not finite" in sentence
    assert sentence.endswith("; no checkpoint is good")


def test_a_loss_scale_that_is_lowered_is_normal():
    """From 16 down to 1; below that, a smaller one is no help."""
    training = Training(limit=2, dtype="float16", scale=16.0)
    for _ in range(4):
        assert training.step(1.0, INF) == "" and not training.watch.bad
    assert training.scaler.get_scale() == 1
    training.step(1.0, INF)
    assert training.watch.steps == 1
    training.step(1.0)
    assert training.watch.steps == 0 and not training.watch.at_limit
    training.step(1.0, INF), training.step(1.0, INF)
    assert training.watch.at_limit


def test_accumulated_gradients_count_by_step():
    """One of two parts has no finite loss, so that each step is left out."""
    training = Training(limit=2)
    for number in range(4):
        (training.weight * (NAN if number % 2 else 1.0)).backward()
        bad = {"loss": NAN} if number % 2 else {}
        if number % 2:
            training.optimizer.step()
        training.watch.count(bad, bool(bad), step_due=number % 2 == 1)
    assert training.watch.losses == 1 and training.watch.steps == 2 and training.watch.at_limit


def test_what_spoils_a_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor([0.0, -INF]))
    assert first_nonfinite(model) == ""
    model[1].running_var[1] = NAN
    assert first_nonfinite(model) == "1.running_var"
    model[0].weight.data[0, 1] = INF
    assert first_nonfinite(model) == "0.weight"
    assert spoilt("0.weight", 5, "a.pth").sentence == (
        "training ended at iteration 5 because 0.weight is not finite; the last finite checkpoint "
        "is a.pth"
    )


def test_nothing_overflows():
    assert all_finite([torch.full((9,), 3e38), torch.full((9,), 65504.0).half(), torch.ones(0)])
    assert not all_finite([torch.ones(3), torch.tensor([1, -INF]).bfloat16()])


@pytest.mark.parametrize("limit", [0, -1, 2.5, None])
def test_limits(limit):
    with pytest.raises(UsageError, match="max_nonfinite must be an integer of at least 1, got"):
        FiniteWatch(limit)
