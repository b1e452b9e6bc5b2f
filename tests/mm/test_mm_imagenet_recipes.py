"""The classification configs of both families: names, data, published recipe and parameters."""

import pytest
import torch

pytest.importorskip("mmpretrain")

from built_mm_imagenet import built, built_facts, config, make_optimizer
from mmengine.registry import PARAM_SCHEDULERS
from recipes import check_facts, groups_by_name
from recipes_imagenet import RECIPES, SWIN_RECIPES, VOLO_RECIPES

from elsa_core import VARIANTS, VOLO_VARIANTS
from elsa_core.blocks import Block

each = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.arch)


@each
def test_data(recipe):
    for part in ("train", "val", "test"):
        dataset = config(recipe)[f"{part}_dataloader"].dataset
        assert dataset.type == "ImageNet" and dataset.data_root == "data/imagenet"
        assert dataset.split == ("train" if part == "train" else "val")


@each
def test_model(recipe):
    model = built(recipe)
    low, high = recipe.parameters
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert low <= (count if recipe.volo else round(count)) <= high
    blocks = [block for block in model.backbone.modules() if isinstance(block, Block)]
    arch = {**VARIANTS, **VOLO_VARIANTS}[recipe.arch]
    last, spared = sum(arch.depths) - 1, arch.depths[0] if recipe.volo else 0
    rates = [recipe.drop_path * i / last * (i >= spared) for i in range(last + 1)]
    assert [block.drop_path.rate for block in blocks] == pytest.approx(rates)
    assert tuple(model.head.fc.weight.shape) == (1000, model.backbone.num_features[-1])


@pytest.mark.parametrize("recipe", SWIN_RECIPES, ids=lambda recipe: recipe.arch)
def test_classifiers_of_swin(recipe):
    model = built(recipe)
    assert type(model.neck).__name__ == "GlobalAveragePooling"
    assert not model.backbone.always_shift


@pytest.mark.parametrize("recipe", VOLO_RECIPES, ids=lambda recipe: recipe.arch)
def test_classifiers_of_volo(recipe):
    model = built(recipe)
    assert model.neck is None and model.backbone.post_network is not None
    assert model.backbone.img_size == 224 and not model.backbone.norm_eval
    assert model.head.aux_fc is not None and model.head.aux_loss_weight == 0.5


@each
def test_recipe(recipe):
    check_facts(built_facts(config(recipe), built(recipe)), recipe.facts())


@each
def test_decay(recipe):
    model = built(recipe)
    optimizer = make_optimizer(config(recipe), model).optimizer
    assert type(optimizer) is torch.optim.AdamW
    groups = groups_by_name(model, optimizer)
    assert {group["lr"] for group in groups.values()} == {recipe.lr}
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {
        name: 0.0 if recipe.undecayed(name, parameter.dim()) else recipe.weight_decay
        for name, parameter in model.named_parameters()
    }
    decayed = {name.split(".")[-1] for name, decay in decays.items() if decay}
    assert decayed == {"weight", "ghost_head"} | (set() if recipe.volo else {"rb"})


@each
def test_schedule(recipe):
    cfg = config(recipe)
    epochs, (scheduler,) = cfg.train_cfg.max_epochs, cfg.param_scheduler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler = PARAM_SCHEDULERS.build(dict(scheduler, optimizer=optimizer, end=epochs))
    assert scheduler.by_epoch  # constant within an epoch
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = recipe.rates
    assert {epoch: rates[epoch] for epoch in expected} == pytest.approx(expected, rel=1e-12)
    assert rates[-10:] == [1e-5] * 10
