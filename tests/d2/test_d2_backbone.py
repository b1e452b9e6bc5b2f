"""ELSA-Swin as a Detectron2 backbone."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

import elsa_core
import elsa_d2

ARCH = dict(embed_dim=12, depths=[1, 1, 1, 2], num_heads=[1, 2, 3, 4], group_width=4, window_size=3)


def tiny_config(**keys):
    cfg = elsa_d2.load_config()
    cfg.MODEL.BACKBONE.NAME = "build_elsa_swin_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.ELSA_SWIN.ARCH = "custom"
    for name, value in ARCH.items():
        cfg.MODEL.ELSA_SWIN.CUSTOM_ARCH[name.upper()] = value
    for name, value in keys.items():
        cfg.MODEL.ELSA_SWIN[name] = value
    return cfg


def test_importing_registers_the_builders():
    assert "build_elsa_swin_backbone" in BACKBONE_REGISTRY
    assert "build_elsa_swin_fpn_backbone" in BACKBONE_REGISTRY


@pytest.mark.parametrize("size", [(96, 64), (67, 45)])
def test_features_are_those_of_elsa_core(size):
    torch.manual_seed(0)
    core = elsa_core.ELSASwin(ARCH).eval()
    ours = elsa_d2.ELSASwin(ARCH).eval()
    assert isinstance(ours, Backbone)
    assert list(ours.state_dict()) == list(core.state_dict())
    ours.load_state_dict(core.state_dict())
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, features = core(image), ours(image)
    assert list(features) == ["res2", "res3", "res4", "res5"]
    shapes = ours.output_shape()
    for wanted, (name, feature) in zip(expected, features.items(), strict=True):
        assert torch.equal(wanted, feature)
        assert shapes[name].channels == feature.shape[1]
        assert feature.shape[2:] == tuple(-(-length // shapes[name].stride) for length in size)


def test_config_reaches_the_backbone():
    cfg = tiny_config(
        OUT_FEATURES=["res3", "res5"],
        FROZEN_STAGES=1,
        DROP_PATH_RATE=0.3,
        DROP_RATE=0.2,
        ATTN_DROP_RATE=0.1,
        WITH_CP=True,
    )
    cfg.MODEL.BACKBONE.NAME = "build_elsa_swin_backbone"
    model = elsa_d2.build_elsa_swin_backbone(cfg, ShapeSpec(channels=4))
    assert model.arch == elsa_core.ELSASwin(ARCH).arch
    assert model.in_chans == 4
    assert list(model.output_shape()) == ["res3", "res5"]
    assert [shape.stride for shape in model.output_shape().values()] == [8, 32]
    assert list(model(torch.zeros(1, 4, 32, 32))) == ["res3", "res5"]
    assert model.layers[-1].blocks[-1].drop_path.rate == pytest.approx(0.3)
    assert model.layers[-1].blocks[-1].attn.attn_drop == 0.1
    assert model.pos_drop.p == 0.2
    assert model.layers[0].with_cp
    assert not any(parameter.requires_grad for parameter in model.layers[0].parameters())
    assert all(parameter.requires_grad for parameter in model.layers[1].parameters())


def test_a_named_variant_comes_from_the_config():
    cfg = elsa_d2.load_config()
    cfg.MODEL.ELSA_SWIN.ARCH = "small"
    with torch.device("meta"):
        model = elsa_d2.build_elsa_swin_backbone(cfg, ShapeSpec(channels=3))
    assert sum(parameter.numel() for parameter in model.parameters()) == 52_106_970


def test_feature_pyramid():
    model = build_backbone(tiny_config()).eval()
    assert model.size_divisibility == 32
    shapes = model.output_shape()
    assert [shape.stride for shape in shapes.values()] == [4, 8, 16, 32, 64]
    with torch.no_grad():
        features = model(torch.randn(1, 3, 64, 96))
    assert list(features) == list(shapes) == ["p2", "p3", "p4", "p5", "p6"]
    assert [tuple(f.shape) for f in features.values()] == [
        (1, 8, 16, 24),
        (1, 8, 8, 12),
        (1, 8, 4, 6),
        (1, 8, 2, 3),
        (1, 8, 1, 2),
    ]


def test_feature_pyramid_over_some_stages():
    cfg = tiny_config()
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4"]
    model = build_backbone(cfg).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 64, 64))
    assert list(features) == ["p3", "p4", "p5"]
    assert features["p5"].shape == (1, 8, 2, 2)


@pytest.mark.parametrize(
    "features", [[], ["res1"], ["res3", "res2"], ["res2", "res2"], ["stage1"], ["res2", "res6"]]
)
def test_wrong_out_features(features):
    with pytest.raises(ValueError, match="out_features must be one or more of res2, .* got"):
        elsa_d2.ELSASwin(ARCH, out_features=features)


@pytest.mark.parametrize(
    "features", [[], ["res3", "res2"], ["res2", "res4"], ["res2", "res9"], ["p2"], ["res2"] * 2]
)
def test_wrong_pyramid_inputs(features):
    cfg = tiny_config()
    cfg.MODEL.FPN.IN_FEATURES = features
    with pytest.raises(ValueError, match="MODEL.FPN.IN_FEATURES must be consecutive"):
        build_backbone(cfg)


@pytest.mark.slow
def test_lazy_config_of_a_free_architecture(tmp_path):
    """Written and read, changed by the command line, built, trained for a step; it detects."""
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    model.backbone.bottom_up = L(elsa_d2.ELSASwin)(
        arch=dict(ARCH), out_features=["res2", "res3", "res4", "res5"]
    )
    model.roi_heads.update(num_classes=3)
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    file = str(tmp_path / "config.yaml")
    LazyConfig.save(OmegaConf.create({"model": model}), file)
    part = "model.backbone.bottom_up"
    changes = [f"{part}.arch.depths=[1,1,2,1]", f"{part}.frozen_stages=0"]
    torch.manual_seed(0)
    model = instantiate(LazyConfig.apply_overrides(LazyConfig.load(file), changes).model)
    backbone = model.backbone.bottom_up
    assert backbone.arch == elsa_core.ELSASwin({**ARCH, "depths": (1, 1, 2, 1)}).arch
    assert not backbone.patch_embed.proj.weight.requires_grad

    objects = Instances((64, 64), gt_classes=torch.tensor([2]))
    objects.gt_boxes = Boxes(torch.tensor([[9.0, 12.0, 50.0, 60.0]]))
    objects.gt_masks = BitMasks(torch.ones(1, 64, 64, dtype=torch.bool))
    record = {"image": torch.randint(0, 256, (3, 64, 64)).float(), "instances": objects}
    before = backbone.layers[0].blocks[0].norm1.weight.clone()
    with EventStorage():
        losses = model([record])
    assert {"loss_mask", "loss_box_reg", "loss_rpn_cls"} <= set(losses)
    sum(losses.values()).backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert not torch.equal(backbone.layers[0].blocks[0].norm1.weight, before)
    with torch.no_grad():
        (found,) = model.eval()([record])
    assert len(found["instances"]) > 0 and found["instances"].has("pred_masks")


def test_pyramid_inputs_that_the_backbone_does_not_return():
    cfg = tiny_config(OUT_FEATURES=["res3", "res4", "res5"])
    with pytest.raises(ValueError, match=r"\(res3, res4, res5\), got \['res2', "):
        build_backbone(cfg)
