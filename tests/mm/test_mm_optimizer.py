"""Parameter groups by MMEngine's settings; tests/parity has them beside Detectron2's."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from mm_tiny import ARCH

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from elsa_core.runtime.errors import UsageError
from elsa_mm import ELSAOptimWrapperConstructor, ELSASwin
from elsa_mm.loading import check_groups
from elsa_mm.preflight import check_config


class Model(nn.Module):
    """A backbone, and two heads with a common weight."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = ELSASwin(ARCH, **options)
        self.heads = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.heads[1].weight = self.heads[0].weight

    def get_layer_depth(self, name):  # as MMPretrain's ImageClassifier
        return self.backbone.get_layer_depth(name, "backbone.")


def rates(model, constructor="ELSAOptimWrapperConstructor", optimizer=None, clip=None, **settings):
    """Learning rate and decay of each parameter."""
    optimizer = optimizer or dict(type="AdamW", lr=0.01, weight_decay=0.1)
    wrapper = dict(optimizer=optimizer, constructor=constructor, paramwise_cfg=settings)
    wrapper = build_optim_wrapper(model, dict(wrapper, clip_grad=clip))
    assert type(wrapper) is OptimWrapper
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in wrapper.optimizer.param_groups
        for parameter in group["params"]
    }


def test_settings_combine():
    settings = dict(custom_keys={"fc1": dict(lr_mult=2.0, decay_mult=0.5)}, norm_decay_mult=0.0)
    found = rates(Model(frozen_stages=0), layer_decay=0.5, backbone_lr_factor=0.2, **settings)
    assert found["backbone.layers.0.blocks.0.mlp.fc1.bias"] == (0.01 * 2 * (0.2 * 0.5**5), 0.05)
    assert found["backbone.layers.0.blocks.0.norm1.bias"] == (0.01 * (0.2 * 0.5**5), 0.0)
    assert found["backbone.norm0.weight"] == (0.01 * 0.2, 0.0)
    assert found["heads.0.weight"] == found["heads.1.bias"] == (0.01, 0.1)
    assert "heads.1.weight" not in found and "backbone.patch_embed.norm.weight" not in found


def test_mmpretrains_constructor_gives_the_same_rates():
    pytest.importorskip("mmpretrain.engine")
    name = "mmpretrain.LearningRateDecayOptimWrapperConstructor"
    model = Model()
    del model.heads[1]
    theirs = rates(model, name, layer_decay_rate=0.7, norm_decay_mult=0.0)
    assert theirs == rates(model, layer_decay=0.7, norm_decay_mult=0.0)
    assert len({rate for rate, _ in theirs.values()}) == 7


def test_layers_are_those_of_mmpretrains_swin():
    backbones = pytest.importorskip("mmpretrain.models.backbones")
    stock = backbones.SwinTransformer(
        dict(embed_dims=16, depths=ARCH["depths"], num_heads=[1, 2, 4, 8]), out_indices=(0, 1, 2, 3)
    )
    names = [name for name, _ in stock.named_parameters()]
    ours = ELSASwin(ARCH)
    for name in names:
        assert ours.get_layer_depth(name.replace("stages", "layers")) == stock.get_layer_depth(name)
    assert any("downsample" in name for name in names) and "norm3.weight" in names


def test_registered_for_every_toolbox():
    found = OPTIM_WRAPPER_CONSTRUCTORS.get("ELSAOptimWrapperConstructor")
    assert found is ELSAOptimWrapperConstructor


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(layer_decay=1.5), r"paramwise_cfg.layer_decay must be a number in \(0, 1\], got 1.5"),
        (dict(backbone_lr_factor="x"), "cfg.backbone_lr_factor must be a number of at least 0, an"),
        (dict(layer_decay_rate=0.9), "must be among layer_decay, .*, got layer_decay_rate"),
        (dict(optimizer=dict(type="AdamW")), "optim_wrapper.optimizer.lr must be given, got none"),
        (dict(clip=dict(max_norm=-1)), "clip_grad.max_norm must be a number above 0, got -1"),
    ],
)
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        rates(Model(), **settings)


def test_a_training_resumes_with_its_own_rates():
    def optimizer(decay):
        model = Model()
        settings = dict(constructor="ELSAOptimWrapperConstructor", optimizer=dict(type="SGD", lr=1))
        return build_optim_wrapper(model, dict(settings, paramwise_cfg=dict(layer_decay=decay)))

    runner = SimpleNamespace(optim_wrapper=optimizer(0.9))
    for decay in (0.9, 0.8):
        checkpoint = {"optimizer": optimizer(decay).state_dict()}
        with nullcontext() if decay == 0.9 else pytest.raises(UsageError, match="learning rates"):
            check_groups(runner, checkpoint)
    check_groups(runner, {})
    check_groups(SimpleNamespace(optim_wrapper={"optimizer": {}}), checkpoint)


def test_settings_without_the_constructor_are_refused():
    wrapper = dict(optimizer=dict(type="AdamW", lr=0.01), paramwise_cfg=dict(layer_decay=0.9))
    with pytest.raises(UsageError, match="layer_decay needs optim_wrapper.constructor='ELSAOptim"):
        check_config(Config(dict(optim_wrapper=wrapper)))
