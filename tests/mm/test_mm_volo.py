"""ELSA-VOLO in OpenMMLab: the maps are the core's, and every toolbox finds the classes."""

import mmdet.registry
import mmengine.registry
import mmseg.registry
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from volo_weights import SMALL, stock

import elsa_core
import elsa_mm
from elsa_core.runtime.errors import UsageError
from elsa_core.weights import load_backbone
from elsa_mm.optim_wrapper import CPUAmpOptimWrapper
from elsa_mm.preflight import check_config
from elsa_mm.strategy import elsa_swin_blocks

ARCH = dict(depths=[1, 1, 2, 1], embed_dims=[12, 24], num_heads=[3, 4], stem_dim=4)
KINDS = {"ELSAVolo": elsa_core.ELSAVolo, "ELSAVoloTokens": elsa_core.ELSAVoloTokens}
each = pytest.mark.parametrize("kind", KINDS)


def build(kind="ELSAVolo", **options):
    return mmengine.registry.MODELS.build(dict(type=kind, arch=ARCH, img_size=64, **options))


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@each
@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmseg"])
def test_every_toolbox_finds_the_one_registration(scope, kind):
    init_default_scope(scope)
    registry = {"mmengine": mmengine, "mmdet": mmdet, "mmseg": mmseg}[scope].registry.MODELS
    assert type(registry.build(dict(type=kind, arch=ARCH))) is getattr(elsa_mm, kind)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("ELSAVolo", {}),
        ("ELSAVolo", {"pyramid": True, "out_indices": (0, 2, 3)}),
        ("ELSAVoloTokens", {}),
        ("ELSAVoloTokens", {"class_token": False}),
    ],
)
def test_outputs_are_those_of_the_core_and_contiguous(kind, options):
    torch.manual_seed(3)
    core = KINDS[kind](ARCH, img_size=64, **options).eval()
    torch.manual_seed(3)
    adapter = build(kind, **options).eval()
    adapter.init_weights()
    assert adapter.is_init and same(core.state_dict(), adapter.state_dict())
    image = torch.randn(2, 3, 45, 70)
    expected, got = core(image), adapter(image)
    assert isinstance(got, tuple) and len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert all(output.is_contiguous() for output in got)


def test_frozen_stages_and_norms_stay_in_evaluation_mode():
    adapter = build(frozen_stages=1, norm_eval=True)
    adapter.init_weights()
    assert adapter.train() is adapter
    assert not adapter.network[0].training and adapter.network[2].training
    assert not adapter.pos_embed.requires_grad
    assert not any(p.requires_grad for p in adapter.network[0].parameters())
    norms = [m for m in build(norm_eval=True).train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 and not any(norm.training for norm in norms)


def test_bfloat16_on_cpus_keeps_the_box_whole():
    """The wrapper returns a backbone's outputs in float32, but not what are indices."""
    model = nn.Module()
    model.backbone = build("ELSAVoloTokens").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CPUAmpOptimWrapper(optimizer=optimizer).optim_context(model):
        token, patches, box = model.backbone(torch.randn(2, 3, 64, 64))
    assert token.dtype == patches.dtype == torch.float32 and box.dtype == torch.int64
    (token.sum() + patches.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_fsdp_gathers_all_blocks_one_at_a_time():
    model = build("ELSAVoloTokens")
    found = [name for name, module in model.named_modules() if elsa_swin_blocks(module, False, 0)]
    blocks = [
        f"network.{i}.{j}" for i, depth in ((0, 1), (2, 1), (3, 2), (4, 1)) for j in range(depth)
    ]
    assert found == [*blocks, "post_network.0", "post_network.1"]


def config(kind, imports=("elsa_mm",), backbone=None, **parts):
    backbone = dict(type=kind, arch=ARCH, **(backbone or {}))
    return Config(
        dict(custom_imports=dict(imports=list(imports)), model=dict(backbone=backbone, **parts))
    )


HEAD = dict(type="elsa_mm.volo_head.VoloHead", num_classes=5)
TOKENS = "the backbone ELSAVoloTokens and the head elsa_mm.volo_head.VoloHead need each other, got "


@pytest.mark.parametrize(
    "given, sentence",
    [
        (
            config("ELSAVolo", imports=[]),
            "the config uses ELSAVolo and does not import it, add the line custom_imports = "
            "dict(imports=['elsa_mm'])",
        ),
        (
            config("ELSAVoloTokens", backbone=dict(drop_rate=1)),
            "ELSAVoloTokens: drop_rate must be in [0, 1), got drop_rate=1",
        ),
        (
            config("ELSAVolo", neck=[dict(type="FPN", in_channels=[12, 24, 24, 24])]),
            "model.backbone.pyramid must be True for the neck FPN, whose maps halve from one to "
            "the next, got False",
        ),
        (
            config(
                "ELSAVolo",
                backbone=dict(pyramid=True),
                neck=dict(type="FPN", in_channels=[12, 24, 24, 24]),
            ),
            "model.neck.in_channels must be the backbone's [6, 12, 24, 24], got [12, 24, 24, 24]",
        ),
        (
            config("ELSAVoloTokens", head=dict(HEAD, in_channels=48), type="ImageClassifier"),
            "model.head.in_channels must be the backbone's 24, got 48",
        ),
        (
            config("ELSAVolo", head=dict(HEAD, in_channels=24), type="ImageClassifier"),
            f"{TOKENS}ELSAVolo with elsa_mm.volo_head.VoloHead",
        ),
        (
            config("ELSAVoloTokens", head=dict(type="LinearClsHead", in_channels=24)),
            f"{TOKENS}ELSAVoloTokens with LinearClsHead",
        ),
        (
            config("ELSAVoloTokens", backbone=dict(class_token=False), head=HEAD),
            "model.head.aux must be False where model.backbone.class_token is, got True: the "
            "classifier of the patch tokens stands beside that of the class token",
        ),
    ],
)
def test_refusals_before_anything_is_built(given, sentence):
    with pytest.raises(UsageError) as error:
        check_config(given)
    assert str(error.value) == sentence


def test_models_of_other_frameworks_parts_pass():
    check_config(config("ELSAVolo", decode_head=dict(in_channels=[12, 24, 24, 24])))
    neck = dict(type="GlobalAveragePooling")
    head = dict(type="LinearClsHead", in_channels=24)
    check_config(config("ELSAVolo", type="ImageClassifier", neck=neck, head=head))


@pytest.mark.parametrize("kind, options", [("ELSAVolo", {"pyramid": True}), ("ELSAVoloTokens", {})])
def test_public_weights_of_volo_initialise(tmp_path, kind, options):
    """As `load_backbone` does, whose tests are tests/weights/test_volo_start.py."""
    pytest.importorskip("timm")
    path = tmp_path / "volo.pth.tar"
    torch.save({"state_dict": stock().state_dict()}, path)
    arch = {**vars(SMALL), "num_heads": (3, 4)}
    models = []
    for make, more in (
        (KINDS[kind], {}),
        (getattr(elsa_mm, kind), {"init_cfg": dict(type="Pretrained", checkpoint=str(path))}),
    ):
        torch.manual_seed(3)
        models.append(make(arch, img_size=224, **options, **more))
    core, adapter = models
    assert same(core.state_dict(), adapter.state_dict())
    load_backbone(core, path)
    assert not same(core.state_dict(), adapter.state_dict())
    adapter.init_weights()
    assert same(core.state_dict(), adapter.state_dict())
