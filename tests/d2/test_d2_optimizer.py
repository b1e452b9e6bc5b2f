"""Parameter groups by Detectron2's keys; tests/parity/test_recipes.py has the recipes'."""

import pytest
import torch

pytest.importorskip("detectron2")

from d2_tiny import CONFIG, overrides
from detectron2.modeling import build_model

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
    cfg.SOLVER.BETAS = (0.8, 0.9)
    optimizer = build_optimizer(cfg, model)
    rates, decays = (settings(model, optimizer, key) for key in ("lr", "weight_decay"))
    assert decays["backbone.bottom_up.layers.0.blocks.0.attn.ghost_head"] == 0.0
    assert decays["backbone.bottom_up.norm0.weight"] == 0.01
    assert decays["roi_heads.box_head.conv1.norm.weight"] == 0.01
    assert rates["roi_heads.box_head.fc1.bias"] == 2 * cfg.SOLVER.BASE_LR
    assert rates["roi_heads.box_head.fc1.weight"] == cfg.SOLVER.BASE_LR
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


def test_sgd_is_detectron2s(config, model):
    cfg = config.clone()
    cfg.SOLVER.OPTIMIZER = "SGD"
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["momentum"] == cfg.SOLVER.MOMENTUM


def test_unknown_optimizer(config, model):
    cfg = config.clone()
    cfg.SOLVER.OPTIMIZER = "Adam"
    with pytest.raises(UsageError, match="SOLVER.OPTIMIZER must be one of AdamW, SGD, got 'Adam'"):
        build_optimizer(cfg, model)
