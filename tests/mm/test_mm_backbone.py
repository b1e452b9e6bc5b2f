"""The adapter computes what elsa_core computes, and OpenMMLab finds and initialises it."""

from pathlib import Path

import mmdet.registry
import mmengine.registry
import mmseg.registry
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

import elsa_core
import elsa_mm
from elsa_core.runtime.errors import UsageError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ARCH = dict(embed_dim=12, depths=[1, 1, 2, 2], num_heads=[1, 2, 3, 4], group_width=4, window_size=3)


def build(**options):
    return mmengine.registry.MODELS.build(dict(type="ELSASwin", arch=ARCH, **options))


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmseg"])
def test_every_toolbox_finds_the_one_registration(scope):
    init_default_scope(scope)
    registry = {"mmengine": mmengine, "mmdet": mmdet, "mmseg": mmseg}[scope].registry.MODELS
    assert type(registry.build(dict(type="ELSASwin", arch=ARCH))) is elsa_mm.ELSASwin


def test_features_are_those_of_the_core():
    core = elsa_core.ELSASwin(ARCH, out_indices=(1, 3)).eval()
    adapter = build(out_indices=(1, 3)).eval()
    adapter.load_state_dict(core.state_dict())
    x = torch.randn(2, 3, 45, 70)
    expected, got = core(x), adapter(x)
    assert isinstance(got, tuple) and len(got) == 2
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_init_weights_keeps_the_initialisation_of_the_core():
    torch.manual_seed(3)
    core = elsa_core.ELSASwin(ARCH)
    torch.manual_seed(3)
    adapter = build()
    adapter.init_weights()
    assert adapter.is_init
    assert same(core.state_dict(), adapter.state_dict())


@pytest.mark.parametrize("prefix", [None, "backbone."])
def test_pretrained(tmp_path, prefix):
    weights = elsa_core.ELSASwin(ARCH).state_dict()
    stored = {(prefix or "") + name: tensor for name, tensor in weights.items()}
    stored["neck.conv.weight" if prefix else "head.weight"] = torch.zeros(1)
    torch.save({"meta": {}, "state_dict": stored}, tmp_path / "weights.pth")
    options = {"prefix": prefix} if prefix else {}
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth"), **options)
    adapter = build(init_cfg=init_cfg)
    assert not same(weights, adapter.state_dict())
    adapter.init_weights()
    assert same(weights, adapter.state_dict())


def test_pretrained_file_that_is_not_there():
    adapter = build(init_cfg=dict(type="Pretrained", checkpoint="gone.pth"))
    with pytest.raises(UsageError, match="gone.pth cannot be read: No such file or directory"):
        adapter.init_weights()


def test_pretrained_backbone_of_a_detector(tmp_path):
    cfg = Config.fromfile(CONFIGS / "mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py")
    weights = elsa_core.ELSASwin(cfg.model.backbone.arch).state_dict()
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth"))
    init_default_scope("mmdet")
    detector = mmdet.registry.MODELS.build(cfg.model)
    detector.init_weights()
    assert same(weights, detector.backbone.state_dict())


def test_train_and_eval_return_the_module_and_frozen_stages_stay_frozen():
    adapter = build(frozen_stages=1)
    assert adapter.train() is adapter and adapter.eval() is adapter
    adapter.init_weights()
    adapter.train()
    assert not adapter.layers[0].training and adapter.layers[1].training
    assert not any(p.requires_grad for p in adapter.layers[0].parameters())
