"""Parameter groups by Detectron2's keys; tests/parity/test_recipes.py has the recipes'."""

import math

import pytest
import torch

pytest.importorskip("detectron2")

from d2_tiny import CONFIG, overrides
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from elsa_core.runtime.finite import FiniteWatch
from elsa_d2 import UsageError, build_optimizer, load_config


@pytest.fixture(scope="module")
def config(digits):
    # The heads' normalisation layers are those of the cascade models.
    keys = {"MODEL__ROI_BOX_HEAD__NORM": "BN", "MODEL__ROI_BOX_HEAD__NUM_CONV": 1}
    keys |= {"MODEL__FPN__NORM": "BN", "MODEL__DEVICE": "cpu"}
    return load_config(CONFIG, overrides(digits, **keys))


@pytest.fixture(scope="module")
def model(config):
    return build_model(config)


def settings(model, optimizer, key):
    """Parameter name -> what its group says, from exactly one group each."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    pairs = [(names[p], group[key]) for group in optimizer.param_groups for p in group["params"]]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_detectron2s_keys_keep_their_meaning(config, model):
    cfg = config.clone()
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.01
    cfg.SOLVER.WEIGHT_DECAY_EXEMPT = ["ghost_head"]
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    cfg.SOLVER.LAYER_DECAY = 0.5
    cfg.SOLVER.BETAS = (0.8, 0.9)
    optimizer = build_optimizer(cfg, model)
    rates, decays = (settings(model, optimizer, key) for key in ("lr", "weight_decay"))
    assert decays["backbone.bottom_up.layers.0.blocks.0.attn.ghost_head"] == 0.0
    assert decays["backbone.bottom_up.norm0.weight"] == 0.01
    assert decays["roi_heads.box_head.conv1.norm.weight"] == 0.01
    assert rates["roi_heads.box_head.fc1.bias"] == 2 * cfg.SOLVER.BASE_LR
    assert rates["roi_heads.box_head.fc1.weight"] == cfg.SOLVER.BASE_LR
    # Layer 1 of 7, whose last is the head.
    name = "backbone.bottom_up.layers.0.blocks.0.mlp.fc1"
    assert rates[f"{name}.weight"] == cfg.SOLVER.BASE_LR * 0.5**5
    assert rates[f"{name}.bias"] == 2 * cfg.SOLVER.BASE_LR * 0.5**5
    assert len(optimizer.param_groups) < 30
    assert optimizer.defaults["betas"] == (0.8, 0.9)


def test_frozen_parameters_are_in_no_group(config):
    cfg = config.clone()
    cfg.MODEL.ELSA_SWIN.FROZEN_STAGES = 2
    model = build_model(cfg)
    names = set(settings(model, build_optimizer(cfg, model), "lr"))
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "backbone.bottom_up.patch_embed.norm.weight" not in names
    assert "backbone.bottom_up.layers.2.blocks.0.norm1.weight" in names


def test_gradients_are_clipped_where_the_config_says_so(config, model):
    cfg = config.clone()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.25
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    assert all(parameter.grad.abs().max() == 0.25 for parameter in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_norm_of_all_gradients_is_clipped(config, name):
    cfg = config.clone()
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_list(["ENABLED", True, "CLIP_TYPE", "full_model"])
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    cfg.freeze()
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer) is getattr(torch.optim, name)
    for size, norm in ((3.0, 0.5), (0.01, 0.01 * 20**0.5)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, size)
        with EventStorage() as storage:
            optimizer.step()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        assert gradients.norm().item() == pytest.approx(norm) and gradients.unique().numel() == 1
        assert storage.latest()["grad_norm"][0] == pytest.approx(size * 20**0.5)
    FiniteWatch().guard(optimizer)
    model.weight.grad[0, 0] = math.nan
    before = model.bias.clone()
    with EventStorage() as storage:
        optimizer.step()
    assert torch.equal(model.bias, before) and not storage.latest()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"LAYER_DECAY": 0.0}, r"SOLVER.LAYER_DECAY must be a number in \(0, 1\], got 0.0"),
        ({"BACKBONE_LR_FACTOR": -1.0}, "SOLVER.BACKBONE_LR_FACTOR must be a number of at least 0,"),
        ({"CLIP_GRADIENTS.CLIP_TYPE": "all"}, "CLIP_TYPE must be one of value, norm, full_model, "),
        ({"CLIP_GRADIENTS.CLIP_VALUE": 0.0}, "CLIP_VALUE must be a number above 0, got 0.0"),
    ],
)
def test_bad_values_are_one_sentence(config, model, keys, sentence):
    cfg = config.clone()
    keys = {"CLIP_GRADIENTS.ENABLED": True, "CLIP_GRADIENTS.CLIP_TYPE": "full_model", **keys}
    cfg.SOLVER.merge_from_list([part for pair in keys.items() for part in pair])
    with pytest.raises(UsageError, match=sentence):
        build_optimizer(cfg, model)


def test_sgd_is_detectron2s(config, model):
    cfg = config.clone()
    cfg.SOLVER.OPTIMIZER = "SGD"
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["momentum"] == cfg.SOLVER.MOMENTUM
    cfg.SOLVER.LAYER_DECAY = 0.9
    with pytest.raises(UsageError, match="SOLVER.BACKBONE_LR_FACTOR need SOLVER.OPTIMIZER AdamW"):
        build_optimizer(cfg, model)


def test_unknown_optimizer(config, model):
    cfg = config.clone()
    cfg.SOLVER.OPTIMIZER = "Adam"
    with pytest.raises(UsageError, match="SOLVER.OPTIMIZER must be one of AdamW, SGD, got 'Adam'"):
        build_optimizer(cfg, model)
