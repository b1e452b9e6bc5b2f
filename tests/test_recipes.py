"""Both frameworks build what the recipes say, number by number."""

import math
from functools import cache

import pytest
import torch
from recipes import RECIPES

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

import built_d2
import built_mm

FRAMEWORKS = {"detectron2": built_d2.Built, "openmmlab": built_mm.Built}
each = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
# MMEngine multiplies the rate of the last iteration by a factor, 160,000 times.
TOLERANCE = {"detectron2": 1e-12, "openmmlab": 1e-9}
both = pytest.mark.parametrize("framework", FRAMEWORKS)


@cache
def built(framework, recipe):
    return FRAMEWORKS[framework](recipe)


@both
@each
def test_model_data_and_augmentation(framework, recipe):
    expected, got = recipe.facts(), built(framework, recipe).facts()
    assert got.keys() == expected.keys()
    for name, fact in expected.items():
        assert equal(got[name], fact), f"{name}: {got[name]} instead of {fact}"


def equal(left, right):
    """Equality of nested tuples and lists, of numbers up to rounding."""
    if isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(right, float) and not isinstance(left, (str, type(None))):
        return math.isclose(left, right, rel_tol=1e-6, abs_tol=1e-12)
    return left == right


@both
@each
def test_optimizer(framework, recipe):
    objects = built(framework, recipe)
    optimizer = objects.optimizer
    assert type(optimizer) is torch.optim.AdamW
    names = {id(parameter): name for name, parameter in objects.model.named_parameters()}
    decays = {}
    for group in optimizer.param_groups:
        assert group["lr"] == recipe.lr
        decays |= {names[id(parameter)]: group["weight_decay"] for parameter in group["params"]}
    backbone, prefix = objects.backbone
    spared = {prefix + name for name, _ in backbone.named_parameters() if recipe.undecayed in name}
    assert decays == {
        name: 0.0 if name in spared else recipe.weight_decay for name in names.values()
    }
    assert len(spared) > 2 * 2 * len(recipe.drop_paths)  # two norms a block, and others
    assert {name.split(".")[-1] for name in decays.keys() - spared} >= {"rb", "ghost_head"}


@both
@each
def test_schedule(framework, recipe):
    objects = built(framework, recipe)
    assert objects.length() == (recipe.epochs or recipe.iterations)
    warmup, last = recipe.warmup, recipe.iterations - 1
    iterations = [0, warmup // 2, warmup - 1, warmup, warmup + 1]
    if recipe.epochs:
        first, second = (recipe.iterations * part // 36 for part in recipe.steps)
        iterations += [first - 1, first, second - 1, second, last]
    else:
        iterations += [10_000, 40_000, last]
    expected = [recipe.rate(iteration) for iteration in iterations]
    assert objects.rates(recipe, iterations) == pytest.approx(
        expected, rel=TOLERANCE[framework], abs=0
    )
