"""Both frameworks give every parameter the same learning rate and decay, and take equal steps."""

import copy

import pytest
import torch
from recipes import RECIPES, groups_by_name

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import built_d2
import built_mm
from detectron2.utils.events import EventStorage
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from parity import d2_config, mmdet_name, pair
from upernet_names import our_name

import elsa_mm  # noqa: F401  registers the constructor
from elsa_d2 import build_lr_scheduler, build_optimizer

RULE = dict(layer_decay=0.85, backbone_lr_factor=0.5)
METHODS = ("mask-rcnn", "upernet")


def d2_optimizer(cfg, model, **more):
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    solver.LAYER_DECAY, solver.BACKBONE_LR_FACTOR = RULE.values()
    solver.merge_from_list([part for item in more.items() for part in item])
    return cfg, build_optimizer(cfg, model)


def mm_wrapper(config, model, scope, constructor="ELSAOptimWrapperConstructor", **more):
    config = copy.deepcopy(dict(config, type="OptimWrapper", constructor=constructor, **more))
    config.pop("loss_scale", None)
    config["paramwise_cfg"] = {**config["paramwise_cfg"], **RULE}
    with DefaultScope.overwrite_default_scope(scope):
        return build_optim_wrapper(model, config)


def settings(model, optimizer, rename=str):
    groups = groups_by_name(model, optimizer).items()
    return {rename(name): (group["lr"], group["weight_decay"]) for name, group in groups}


# Each family in each task.
@pytest.mark.parametrize(
    "recipe",
    {(r.method, r.volo): r for r in reversed(RECIPES) if r.method in METHODS}.values(),
    ids=lambda recipe: recipe.name,
)
def test_same_groups(recipe):
    ours, theirs = built_d2.Built(recipe), built_mm.Built(recipe)
    _, optimizer = d2_optimizer(ours.cfg, ours.model)
    wrapper = mm_wrapper(theirs.cfg.optim_wrapper, theirs.model, theirs.cfg.default_scope)
    first = settings(ours.model, optimizer)
    if recipe.method == "upernet":
        second = settings(theirs.model, wrapper.optimizer, our_name)
    else:
        first, second = (
            settings(ours.model, optimizer, mmdet_name),
            settings(theirs.model, wrapper.optimizer),
        )
    assert first == second
    blocks = len(recipe.drop_paths)
    assert first["backbone.norm3.weight" if recipe.method != "upernet" else "backbone.norm3.weight"]
    rates = {rate for rate, _ in first.values()}
    assert rates == {recipe.lr} | {recipe.lr * 0.5 * 0.85**i for i in range(blocks + 2)}


def test_same_steps():
    """AdamW by the rule, with clipping and the schedule, on the same gradients in float64."""
    ours, theirs = (model.double() for model in pair("mask_rcnn", {}, lambda model: None))
    clip = {"CLIP_GRADIENTS.ENABLED": True, "CLIP_GRADIENTS.CLIP_TYPE": "full_model"}
    schedule = {"MAX_ITER": 10, "STEPS": [3], "WARMUP_ITERS": 2, "BASE_LR": 0.01}
    cfg, optimizer = d2_optimizer(d2_config("mask_rcnn"), ours, **clip, **schedule)
    scheduler = build_lr_scheduler(cfg, optimizer)
    recipe = built_mm.Config.fromfile(built_mm.config_of(RECIPES[0])).optim_wrapper
    recipe.optimizer.lr = 0.01
    wrapper = mm_wrapper(recipe, theirs, "mmdet", clip_grad=dict(max_norm=1.0))
    schedulers = [
        PARAM_SCHEDULERS.build(dict(part, by_epoch=False, optimizer=wrapper.optimizer))
        for part in (
            dict(type="LinearLR", start_factor=0.001, end=3),
            dict(type="MultiStepLR", milestones=[3]),
        )
    ]
    pairs = [(ours.get_parameter(n), theirs.get_parameter(mmdet_name(n))) for n in names(ours)]
    assert len(pairs) == len(list(theirs.parameters()))
    rates, before = [], [p.detach().clone() for p, _ in pairs]
    for size in (1.0, 1e-4, 1.0, 1.0):  # the second is not clipped
        for one, other in pairs:
            one.grad = torch.randn_like(one) * size
            other.grad = one.grad.clone()
        rates.append([group["lr"] for group in optimizer.param_groups])
        with EventStorage() as storage:
            optimizer.step()
        wrapper.step()
        norm = MessageHub.get_current_instance().get_scalar("train/grad_norm").current()
        assert storage.latest()["grad_norm"][0] == pytest.approx(norm, rel=1e-12)
        for part in (scheduler, *schedulers):
            part.step()
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert all(not torch.equal(p, old) for (p, _), old in zip(pairs, before, strict=True))
    changes = [rates[i][0] / rates[2][0] for i in range(4)]
    assert changes == pytest.approx([0.001, 0.5005, 1, 0.1])


def names(model):
    return [name for name, _ in model.named_parameters()]
