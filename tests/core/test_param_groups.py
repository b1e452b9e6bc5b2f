"""The rule for learning rates and weight decay, on models of plain PyTorch."""

import math

import pytest
import torch
from torch import nn

from elsa_core import ELSASwin, ELSAVolo, ELSAVoloClassifier, ELSAVoloTokens
from elsa_core.param_groups import apply_rule, check_resumed, describe, lr_factors
from elsa_core.runtime.errors import UsageError

SWIN = dict(embed_dim=8, depths=[1, 2, 1, 2], num_heads=[1, 1, 2, 2], group_width=4, kernel_size=3)
VOLO = dict(depths=[2, 1, 2, 1], embed_dims=[8, 16], num_heads=[1, 2], stem_dim=4, group_width=4)
# The layer of parameters, by the beginnings of their names; all others are the last.
SWIN_LAYERS = {
    "patch_embed.": 0,
    "layers.0.": 1,
    "layers.1.blocks.0.": 2,
    "layers.1.blocks.1.": 3,
    "layers.1.downsample.": 3,
    "layers.2.": 4,
    "layers.3.blocks.0.": 5,
    "layers.3.blocks.1.": 6,
}
VOLO_LAYERS = {
    "patch_embed.": 0,
    "pos_embed": 0,
    "cls_token": 0,
    "network.0.0.": 1,
    "network.0.1.": 2,
    "network.1.": 2,
    "network.2.0.": 3,
    "network.3.0.": 4,
    "network.3.1.": 5,
    "network.4.0.": 6,
}
CLASS_LAYERS = VOLO_LAYERS | {"post_network.0.": 7, "post_network.1.": 8}


def make(kind, **options):
    with torch.device("meta"):
        return kind(SWIN if kind is ELSASwin else VOLO, **options)


@pytest.mark.parametrize(
    ("kind", "options", "layers", "blocks", "undecayed"),
    [
        (ELSASwin, {}, SWIN_LAYERS, 6, set()),
        (ELSASwin, dict(out_indices=(0, 1)), dict(list(SWIN_LAYERS.items())[:4]), 3, set()),
        (ELSAVolo, dict(pyramid=True), VOLO_LAYERS, 6, {"pos_embed"}),
        (ELSAVolo, dict(out_indices=(0,)), dict(list(VOLO_LAYERS.items())[:5]), 2, set()),
        (ELSAVoloTokens, {}, CLASS_LAYERS, 8, {"pos_embed", "cls_token"}),
        (ELSAVoloTokens, dict(class_token=False), VOLO_LAYERS, 6, {"pos_embed"}),
    ],
    ids=["swin", "swin-short", "volo", "volo-short", "tokens", "tokens-mean"],
)
def test_layers_of_each_family(kind, options, layers, blocks, undecayed):
    model = make(kind, **options)
    factors = lr_factors(model, 0.5, 3.0)
    last = 0
    for name, parameter in model.named_parameters():
        depth = next((n for part, n in layers.items() if name.startswith(part)), blocks + 1)
        assert model.get_layer_depth(name) == (depth, blocks + 2), name
        assert model.get_layer_depth(f"body.{name}", "body.") == (depth, blocks + 2)
        assert model.get_layer_depth(f"neck.{name}", "body.") == (blocks + 1, blocks + 2)
        assert factors[parameter] == 3 * 0.5 ** (blocks + 1 - depth)
        last += depth == blocks + 1
    assert len(factors) == len(list(model.parameters())) and last >= 2  # the output norms
    assert model.no_weight_decay() == undecayed


def test_classifiers_of_volo_are_not_its_backbone():
    model = make(ELSAVoloClassifier, num_classes=3)
    named, factors = dict(model.named_parameters()), lr_factors(model, 0.9, 0.1)
    rest = {name for name, parameter in named.items() if parameter not in factors}
    assert rest == {
        f"{head}.{part}" for head in ("head", "aux_head") for part in ("weight", "bias")
    }


class Detector(nn.Module):
    """A backbone that two modules share, with a head whose layers share a weight."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.again = backbone
        self.head = nn.Linear(8, 8, device="meta")
        self.tied = nn.Linear(8, 8, device="meta")
        self.tied.weight = self.head.weight


def test_groups():
    model = Detector(make(ELSAVolo, frozen_stages=0))
    backbone = model.backbone
    heads = {"params": [*model.head.parameters(), *model.tied.parameters()], "lr": 1e-2}
    groups = [{"params": list(backbone.parameters()), "weight_decay": 0.3}, heads]
    rule = dict(layer_decay=0.5, backbone_lr_factor=0.1)
    found = apply_rule(groups, model, 1e-3, **rule)
    (parameters,) = zip(*(group.pop("params") for group in found), strict=True)
    assert len(set(parameters)) == len(parameters)
    assert set(parameters) == {p for p in model.parameters() if p.requires_grad}
    assert not set(parameters) & set(backbone.patch_embed.parameters())
    settings = dict(zip(parameters, found, strict=True))
    assert settings[backbone.norm3.weight] == {"weight_decay": 0.3, "lr": 1e-4}
    assert settings[backbone.pos_embed] == {"weight_decay": 0.0, "lr": 1e-4 * 0.5**7}
    assert settings[model.tied.bias] == {"lr": 1e-2}
    assert describe(model, 1.0, 1.0) == ""
    assert "by 0.0007813 (patch embedding) to 0.1 (output)" in describe(model, **rule)


class Wrapped(nn.Module):
    """As torch.compile leaves it, without the seconds that this takes."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


def test_wrapped_modules_keep_their_layers():
    model = make(ELSASwin)
    expected = list(lr_factors(model, 0.5).values())
    model.layers[0].blocks[0] = Wrapped(model.layers[0].blocks[0])
    model.layers[1] = Wrapped(model.layers[1])
    assert "layers.1._orig_mod.blocks.0.norm1.weight" in dict(model.named_parameters())
    assert list(lr_factors(model, 0.5).values()) == expected


class Flat(nn.Module):
    """A model as FSDP leaves it without use_orig_params."""

    def __init__(self):
        super().__init__()
        self.backbone = make(ELSASwin)
        self.register_parameter("_flat_param", nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.5, math.nan, math.inf, "0.9", None])
def test_bad_layer_decay(layer_decay):
    with pytest.raises(UsageError, match=r"^decay must be a number in \(0, 1\], got "):
        lr_factors(make(ELSASwin), layer_decay, names=("decay", "factor"))


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf, "1"])
def test_bad_backbone_factor(factor):
    with pytest.raises(UsageError, match=r"^factor must be a number of at least 0, and finite, g"):
        lr_factors(make(ELSASwin), 1.0, factor, names=("decay", "factor"))


def test_models_that_the_rule_does_not_fit():
    assert lr_factors(nn.Linear(1, 1)) == {}
    with pytest.raises(UsageError, match=r"^layer_decay 0.9 and .* ELSA backbone, the model has"):
        lr_factors(nn.Linear(1, 1), 0.9)
    with pytest.raises(UsageError, match="backbone_lr_factor 0.5 need FSDP's use_orig_params, got"):
        lr_factors(Flat(), 1.0, 0.5)
    assert lr_factors(make(ELSASwin), 1.0, 0.0)  # as if frozen, but for statistics


def test_a_training_resumes_with_its_own_groups():
    def groups(*rates, sizes=(1, 2)):
        pairs = zip(rates, sizes, strict=True)
        return [{"lr": 0.0, "initial_lr": rate, "params": [0] * size} for rate, size in pairs]

    saved = groups(0.1, 0.05)
    check_resumed(saved, saved)
    check_resumed(saved, groups(0.3, 0.15))  # of another batch size
    check_resumed([], [])
    with pytest.raises(UsageError, match="the checkpoint has 2 parameter groups, the config 3$"):
        check_resumed(saved, groups(0.1, 0.05, 0.025, sizes=(1, 1, 1)))
    with pytest.raises(UsageError, match="2 tensors in parameter group 1 at 0.5 times the"):
        check_resumed(saved, groups(0.1, 0.04))
    with pytest.raises(UsageError, match="1 tensors in .* group 0 at 1 .* the config 2 at 1$"):
        check_resumed(saved, groups(0.1, 0.05, sizes=(2, 1)))
