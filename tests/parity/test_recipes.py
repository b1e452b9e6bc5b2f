"""Both frameworks build what the recipes say, number by number."""

import math
from functools import cache

import pytest
import torch
from recipes import RECIPES, check_facts, first_weights, groups_by_name

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

import built_d2
import built_mm

from elsa_core import VOLO_VARIANTS

FRAMEWORKS = {"detectron2": built_d2.Built, "openmmlab": built_mm.Built}
each = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
SWIN, VOLO = ([r for r in RECIPES if r.volo == volo] for volo in (False, True))
# MMEngine multiplies the rate of the last iteration by a factor, 160,000 times.
TOLERANCE = {"detectron2": 1e-12, "openmmlab": 1e-9}
both = pytest.mark.parametrize("framework", FRAMEWORKS)
METHODS = {recipe.method: recipe for recipe in reversed(RECIPES)}


@cache
def built(framework, recipe):
    return FRAMEWORKS[framework](recipe)


@both
@each
def test_model_data_and_augmentation(framework, recipe):
    check_facts(built(framework, recipe).facts(), recipe.facts())


@pytest.mark.slow
@both
@pytest.mark.parametrize("method", METHODS)
def test_first_weights(framework, method):
    parts = built(framework, METHODS[method]).first_weights()
    assert len(parts) > 20
    for name, weights in parts.items():
        kind, deviation = first_weights(method, name, weights.shape)
        if kind == "constant":
            assert (weights == deviation).all(), name
            continue
        # Four standard errors.
        assert weights.std().item() == pytest.approx(deviation, rel=4 / math.sqrt(weights.numel()))
        assert (weights.abs().max() < 1.74 * deviation) == (kind == "uniform"), name


@both
@pytest.mark.parametrize("method", ["mask-rcnn", "cascade-mask-rcnn"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_boxes_are_pooled_in_float32(framework, method, dtype, tolerance):
    """A box of 301 pixels is larger than float16's 65504, and its edges lie between its numbers."""
    left, top, size, stride = 600.2, 10.0, 301.0, 16
    centre = (left + size / 2) / stride - 0.5
    maps = []
    for step in (4, 8, 16, 32):
        column = torch.arange(960 / step) - round(centre)
        wrong = 0 if step == stride else 7
        maps.append((column + wrong).expand(1, 256, 320 // step, -1).to(dtype))
    box = torch.tensor([[left, top, left + size, top + size]])
    with torch.autocast("cpu", dtype):
        poolings = built(framework, METHODS[method]).pooled(maps, box)
    assert len(poolings) >= 2
    for pooled in poolings:
        assert pooled.dtype == dtype
        middle = pooled.float().mean().item()
        assert middle == pytest.approx(centre - round(centre), abs=tolerance)


@both
@pytest.mark.parametrize("recipe", SWIN, ids=lambda recipe: recipe.name)
def test_maps_of_any_size_are_shifted(framework, recipe):
    backbone, _ = built(framework, recipe).backbone
    assert [block.attn.shift for block in backbone.layers[-1].blocks] == [0, 3]
    assert all(block.attn.always_shift for block in backbone.layers[-1].blocks)


@both
@pytest.mark.parametrize("recipe", VOLO, ids=lambda recipe: recipe.name)
def test_volo_has_a_pyramid_and_keeps_its_batch_norms(framework, recipe):
    backbone, _ = built(framework, recipe).backbone
    assert backbone.arch == VOLO_VARIANTS[recipe.arch]
    assert backbone.pyramid and backbone.norm_eval
    assert backbone.img_size == 224 and backbone.out_indices == (0, 1, 2, 3)
    assert not backbone.train().patch_embed.conv[1].training


@both
@each
def test_optimizer(framework, recipe):
    objects = built(framework, recipe)
    optimizer = objects.optimizer
    assert type(optimizer) is torch.optim.AdamW
    groups = groups_by_name(objects.model, optimizer)
    assert {group["lr"] for group in groups.values()} == {recipe.lr}
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    backbone, prefix = objects.backbone
    spared = {
        f"{prefix}{name}.{part}"
        for name, module in backbone.named_modules()
        if isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    spared |= {f"{prefix}pos_embed"} if recipe.volo else set()
    assert decays == {
        name: 0.0 if name in spared else recipe.weight_decay
        for name, _ in objects.model.named_parameters()
    }
    assert len(spared) > 2 * 2 * len(recipe.drop_paths)  # two norms a block, and others
    assert {name.split(".")[-1] for name in decays.keys() - spared} >= (
        {"ghost_head"} if recipe.volo else {"rb", "ghost_head"}
    )


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


@both
@pytest.mark.parametrize("method", ["mask-rcnn", "cascade-mask-rcnn"])
def test_labels_of_anchors(framework, method):
    """No anchor is positive for a box that none overlaps by the recipe's least IoU."""
    boxes = torch.tensor([[50, 40, 58, 48], [101, 20, 104, 80], [60, 100, 104, 144.0]])
    small, thin, usual = built(framework, METHODS[method]).positive_overlaps(boxes, (192, 256))
    assert small == thin == []
    assert min(usual) >= METHODS[method].least_overlap and len(usual) > 0
    assert min(usual) < 0.7  # without the rule of the best ones it would have none
