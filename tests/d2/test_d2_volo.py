"""ELSA-VOLO as a Detectron2 backbone; tests/parity/test_volo_parity.py compares it."""

import re

import pytest
import torch

pytest.importorskip("detectron2")

from d2_tiny import TINY, VOLO_CONFIG
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

import elsa_core
import elsa_d2
from elsa_d2.config import backbone_arch
from elsa_d2.engine.preflight import check_run

NATIVE = {"stage1": 8, "stage2": 16, "stage3": 16, "stage4": 16}
PYRAMID = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
IMAGE = ShapeSpec(channels=3)


def config(file=VOLO_CONFIG, **keys):
    """The digits config with a tiny model; ``keys`` are of MODEL.ELSA_VOLO."""
    values = {**TINY, "MODEL.DEVICE": "cpu"}
    values |= {f"MODEL.ELSA_VOLO.{name}": value for name, value in keys.items()}
    return elsa_d2.load_config(file, [str(part) for pair in values.items() for part in pair])


def arch():
    return backbone_arch(config(), "ELSA_VOLO")


@pytest.mark.parametrize("size", [(96, 64), (67, 45)])
@pytest.mark.parametrize("pyramid, strides", [(False, NATIVE), (True, PYRAMID)])
def test_features_are_those_of_elsa_core(pyramid, strides, size):
    torch.manual_seed(0)
    core = elsa_core.ELSAVolo(arch(), pyramid=pyramid).eval()
    ours = elsa_d2.ELSAVolo(arch(), pyramid=pyramid).eval()
    assert isinstance(ours, Backbone)
    assert list(ours.state_dict()) == list(core.state_dict())
    ours.load_state_dict(core.state_dict())
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, features = core(image), ours(image)
    shapes = ours.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == strides
    assert ours.size_divisibility == max(strides.values())
    padded = [side + -side % 16 for side in size]
    for wanted, (name, feature) in zip(expected, features.items(), strict=True):
        assert torch.equal(wanted, feature) and feature.is_contiguous()
        assert shapes[name].channels == feature.shape[1]
        assert feature.shape[2:] == tuple(-(-side // strides[name]) for side in padded)


def test_config_reaches_the_backbone():
    cfg = config(
        PYRAMID=False,
        OUT_FEATURES=["stage1", "stage3"],
        FROZEN_STAGES=1,
        DROP_PATH_RATE=0.3,
        DROP_RATE=0.2,
        ATTN_DROP_RATE=0.1,
        WITH_CP=True,
        IMG_SIZE=64,
        NORM_EVAL=True,
        LOCAL_DROP_PATH=True,
    )
    model = elsa_d2.build_elsa_volo_backbone(cfg, ShapeSpec(channels=4))
    assert model.arch == elsa_core.ELSAVolo(arch()).arch
    assert model.in_chans == 4 and not model.pyramid
    assert list(model(torch.zeros(1, 4, 32, 32))) == ["stage1", "stage3"]
    assert len(model.network) == 4  # the last stage is not built
    first, last = model.network[0][0], model.network[-1][-1]
    assert last.drop_path.rate == pytest.approx(0.3 * 3 / 4)
    assert last.attn.attn_drop == first.attn.attn_drop == 0.1
    assert model.pos_drop.p == 0.2 and model.with_cp
    assert model.pos_embed.shape[1:3] == (4, 4)
    assert not model.patch_embed.conv[1].training
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"pos_embed", "network.1.proj.weight"} <= frozen
    assert model.network[2][0].attn.qkv.weight.requires_grad


def test_a_named_variant_comes_from_the_config():
    cfg = elsa_d2.load_config(overrides=["MODEL.ELSA_VOLO.ARCH", "volo_d3"])
    with torch.device("meta"):
        model = elsa_d2.build_elsa_volo_backbone(cfg, IMAGE)
    assert model.arch == elsa_core.VOLO_VARIANTS["volo_d3"]
    assert model.img_size == 224 and list(model.output_shape()) == list(NATIVE)


@pytest.mark.parametrize(
    "features, names, sides",
    [
        (list(PYRAMID), ["p2", "p3", "p4", "p5", "p6"], [16, 8, 4, 2, 1]),
        (["res3", "res4"], ["p3", "p4", "p5"], [8, 4, 2]),
    ],
)
def test_feature_pyramid(features, names, sides):
    cfg = config()
    cfg.MODEL.FPN.IN_FEATURES = features
    model = build_backbone(cfg).eval()
    assert model.size_divisibility == PYRAMID[features[-1]]
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 64))
    assert {name: tuple(one.shape) for name, one in maps.items()} == {
        name: (1, 8, side, side) for name, side in zip(names, sides, strict=True)
    }


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"PYRAMID": False}, "MODEL.ELSA_VOLO.PYRAMID must be True, got False"),
        (
            {"OUT_FEATURES": ["res2", "res4"]},
            "MODEL.FPN.IN_FEATURES must be consecutive features of MODEL.ELSA_VOLO.OUT_FEATURES "
            "(res2, res4), got ['res2', 'res3', 'res4', 'res5']",
        ),
        ({"OUT_FEATURES": ["stage1"]}, "one or more of res2, res3, res4, res5"),
        ({"ARCH": "volo_d9"}, "MODEL.ELSA_VOLO.ARCH must be one of volo_d1, "),
        ({"IMG_SIZE": 0}, "img_size must be an integer of at least 1, got img_size=0"),
        ({"CUSTOM_ARCH.NUM_HEADS": [5, 3]}, "embed_dims must be divisible by num_heads"),
    ],
)
def test_wrong_keys(keys, sentence):
    cfg = config(**keys)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        build_backbone(cfg)
    with pytest.raises(elsa_d2.UsageError, match=re.escape(sentence)):  # before a run begins
        check_run(cfg)


def test_wrong_out_features_of_the_native_maps():
    with pytest.raises(ValueError, match="one or more of stage1, stage2, stage3, stage4, each"):
        elsa_d2.ELSAVolo(arch(), out_features=["res2"])


def record():
    objects = Instances((64, 64), gt_classes=torch.tensor([2]))
    objects.gt_boxes = Boxes(torch.tensor([[9.0, 12.0, 50.0, 60.0]]))
    objects.gt_masks = BitMasks(torch.ones(1, 64, 64, dtype=torch.bool))
    torch.manual_seed(1)
    return {"image": torch.randint(0, 256, (3, 64, 64)).float(), "instances": objects}


def losses(model):
    """Of one step, with the same samples each time."""
    torch.manual_seed(2)
    with EventStorage():
        return model([record()])


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    plain = build_model(config())
    saving = build_model(config(WITH_CP=True))
    saving.load_state_dict(plain.state_dict())
    for model in (plain, saving):
        sum(losses(model).values()).backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert one.grad is not None, name  # DistributedDataParallel needs all
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_stages_keep_their_values(frozen):
    model = build_model(config(FROZEN_STAGES=frozen))
    backbone, optimizer = model.backbone.bottom_up, elsa_d2.build_optimizer(config(), model)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    sum(losses(model.train()).values()).backward()
    optimizer.step()
    changed = {n for n, value in backbone.state_dict().items() if not torch.equal(value, before[n])}
    parts = ["patch_embed", "network.0", "network.2", "network.3", "network.4"]
    frozen_parts = parts[: frozen + 1] + ["network.1", "pos_embed"] * (frozen > 0)
    assert not any(name.startswith(tuple(frozen_parts)) for name in changed)
    rest = {*parts, "network.1", "pos_embed", "norm0", "upsample"} - {*frozen_parts}
    assert all(any(name.startswith(part) for name in changed) for part in rest)


def test_batch_norms_of_the_stem_are_not_for_detectron2s_keys():
    cfg = config(NORM_EVAL=True)
    cfg.MODEL.FPN.NORM = cfg.MODEL.ROI_BOX_HEAD.NORM = "FrozenBN"
    stem = build_model(cfg).train().backbone.bottom_up.patch_embed
    norms = [module for module in stem.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 3 and not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms)


def test_detector_in_mixed_precision():
    model = build_model(config())
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(model)
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in found.values())
    sum(found.values()).backward()
    backbone = model.backbone.bottom_up
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())


def test_weight_decay_spares_norms_and_position_embedding():
    model = build_model(config())
    backbone = model.backbone.bottom_up
    optimizer = elsa_d2.build_optimizer(config(), model)
    names = {p: name for name, p in backbone.named_parameters()}
    spared = {
        names[p]
        for group in optimizer.param_groups
        for p in group["params"]
        if p in names and group["weight_decay"] == 0
    }
    norms = {
        f"{name}.{part}"
        for name, module in backbone.named_modules()
        if isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    assert spared == norms | {"pos_embed"}


def test_lazy_config_names_the_class():
    node = LazyCall(elsa_d2.ELSAVolo)(arch=dict(arch()), pyramid=True, out_features=["res3"])
    model = instantiate(LazyConfig.apply_overrides(node, ["arch.depths=[2,1,1,1]"]))
    assert list(model.output_shape()) == ["res3"] and len(model.network[0]) == 2


def segmentor(**keys):
    file = VOLO_CONFIG.replace("digits/mask_rcnn_elsa_volo_digits", "Base-ELSA-VOLO-UPerNet")
    cfg = config(file, ARCH="custom", **keys)
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = cfg.MODEL.SEM_SEG_HEAD.AUX_CONVS_DIM = 8
    if not cfg.MODEL.ELSA_VOLO.PYRAMID:
        cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = list(NATIVE)
        cfg.MODEL.SEM_SEG_HEAD.AUX_FEATURE = "stage3"
    torch.manual_seed(0)
    return build_model(cfg)


@pytest.mark.parametrize("pyramid", [False, True])
def test_upernet_trains_and_pads_images_without_a_shift(pyramid):
    model = segmentor(PYRAMID=pyramid)
    records = [
        {"image": torch.rand(3, 64, 64) * 255, "sem_seg": torch.randint(0, 3, (64, 64))}
        for _ in range(2)
    ]
    with EventStorage():
        sum(model(records).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    model.eval()
    image = torch.rand(3, 70, 52) * 255
    sides = (96, 64) if pyramid else (80, 64)
    padded = model.pixel_mean.expand(-1, *sides).clone()  # 0 after the normalisation
    padded[:, :70, :52] = image
    with torch.no_grad():
        (found,), (whole,) = (model([{"image": one}]) for one in (image, padded))
    torch.testing.assert_close(found["sem_seg"], whole["sem_seg"][:, :70, :52])
