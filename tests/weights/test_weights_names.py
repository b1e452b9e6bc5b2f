"""Names and shapes are those of the models that both frameworks build."""

from functools import cache

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from detectron2.modeling import build_model
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from weights_models import KINDS, TINY, published_sizes, sizes

import elsa_d2
import elsa_mm
from elsa_core import VARIANTS
from elsa_core.weights.names import rename
from elsa_core.weights.shapes import model_shapes, read_backbone, read_sizes
from elsa_tools.verify import configs, d2, mm

CASES = [(kind, name) for kind in KINDS for name in ("tiny", "small")]
every_model = pytest.mark.parametrize("kind, variant", CASES)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def openmmlab(kind, arch, wanted):
    cfg = Config.fromfile(elsa_mm.get_config_file(configs.OPENMMLAB[kind]))
    mm.set_sizes(cfg.model, arch, wanted, kind)
    with DefaultScope.overwrite_default_scope("mmdet" if kind != "upernet" else "mmseg"):
        with torch.device("meta"):
            return shapes(MODELS.build(cfg.model))


def detectron2(kind, arch, wanted):
    cfg = elsa_d2.load_config(elsa_d2.get_config_file(configs.DETECTRON2[kind]))
    cfg.merge_from_list([*d2.overrides(arch, wanted, kind), "MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        return shapes(build_model(cfg))


@cache
def published(kind, variant):
    """Shapes in Detectron2 and in OpenMMLab."""
    arguments = kind, VARIANTS[variant], published_sizes(kind)
    return detectron2(*arguments), openmmlab(*arguments)


@every_model
def test_shapes_follow_from_a_few_tensors(kind, variant):
    arch, wanted = VARIANTS[variant], published_sizes(kind)
    _, built = published(kind, variant)
    assert model_shapes(arch, wanted, kind) == built
    tensors = {name: torch.empty(shape, device="meta") for name, shape in built.items()}
    assert read_backbone(tensors, "backbone.") == arch
    assert read_sizes(tensors, kind) == wanted


@every_model
def test_names_are_those_of_the_models(kind, variant):
    ours, theirs = published(kind, variant)
    to_d2, unknown = rename(theirs, kind, "d2")
    assert not unknown
    assert {name: shape for name, (_, shape) in to_d2.items()} == ours
    to_mm, unknown = rename(ours, kind, "mm")
    assert not unknown
    assert {name: shape for name, (_, shape) in to_mm.items()} == theirs


@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_norms_of_the_neck(norm):
    wanted = sizes("mask_rcnn", channels=32)
    wanted.neck_norm = norm
    ours, theirs = detectron2("mask_rcnn", TINY, wanted), openmmlab("mask_rcnn", TINY, wanted)
    assert f"neck.fpn_convs.0.{norm}.weight" in theirs
    renamed, _ = rename(ours, "mask_rcnn", "mm")
    assert {name: shape for name, (_, shape) in renamed.items()} == theirs
    assert model_shapes(TINY, wanted, "mask_rcnn") == theirs


@pytest.mark.parametrize(
    "name",
    [
        "backbone.fpn_lateral1.weight",
        "backbone.fpn_lateral2.conv.weight",
        "roi_heads.box_head.fc0.weight",
        "roi_heads.mask_head.mask_fcn1.norm",
        "roi_heads.keypoint_head.conv1.weight",
    ],
)
def test_nothing_is_renamed_by_accident(name):
    assert rename({name: None}, "mask_rcnn", "mm") == ({}, [name])
