"""Checkpoints that cannot be converted: the sentence names the tensor, or what is possible."""

import pytest
import torch
from weights_models import classifier_tensors, detector, swin, with_bookkeeping
from weights_models import same as same_tensors

from elsa_core.runtime.errors import UsageError
from elsa_core.weights import TARGETS, convert, recognise


def tensors(checkpoint, to):
    return convert(recognise(checkpoint), to).tensors


def damaged(change, kind="mask_rcnn", to="detectron2"):
    state = detector(kind)
    change(state)
    with pytest.raises(UsageError) as caught:
        tensors({"state_dict": state}, to)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.patch_embed.proj.weight",
        "backbone.layers.1.blocks.0.attn.ghost_head",
        "backbone.norm2.weight",
        "neck.fpn_convs.3.conv.bias",
        "neck.lateral_convs.0.conv.weight",
        "rpn_head.rpn_cls.weight",
        "roi_head.bbox_head.fc_cls.weight",
        "roi_head.mask_head.conv_logits.bias",
    ],
)
def test_missing_tensors_are_named(name):
    message = damaged(lambda state: state.pop(name))
    assert name in message and "missing" in message


def test_missing_tensors_have_the_names_of_their_framework():
    state = tensors(detector("mask_rcnn"), "detectron2")
    del state["backbone.fpn_output5.bias"]
    with pytest.raises(UsageError, match=r"1 tensor is missing: backbone.fpn_output5.bias"):
        tensors({"model": state}, "mmdet")


@pytest.mark.parametrize("name", ["neck.extra.weight", "backbone.layers.0.blocks.0.gate", "ema_x"])
def test_unknown_tensors_are_named(name):
    message = damaged(lambda state: state.update({name: torch.ones(1)}))
    assert name in message and "no place for 1 tensor" in message


def test_unknown_tensors_of_detectron2_are_named():
    state = tensors(detector("mask_rcnn"), "detectron2")
    state["roi_heads.keypoint_head.conv.weight"] = torch.ones(1)
    with pytest.raises(UsageError, match="unknown.*keypoint_head.conv.weight"):
        tensors({"model": state}, "mmdet")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("roi_head.bbox_head.fc_reg.weight", (4, 64)),
        ("backbone.norm3.bias", (95,)),
        ("neck.fpn_convs.0.conv.weight", (16, 16, 1, 1)),
    ],
)
def test_wrong_shapes_are_named(name, shape):
    message = damaged(lambda state: state.update({name: torch.ones(shape)}))
    assert f"{name} must have" in message and str(list(shape)) in message


def test_wrong_element_types_are_named():
    name = "roi_head.bbox_head.fc_cls.bias"
    message = damaged(lambda state: state.update({name: state[name].long()}))
    assert f"{name} must not hold elements of type torch.int64" in message


def test_position_biases_in_another_order_are_not_guessed():
    state = with_bookkeeping(detector("mask_rcnn"))
    name = "backbone.layers.3.blocks.0.attn.relative_id"
    state[name] = state[name].flip(0)
    with pytest.raises(UsageError, match=f"{name} orders the position biases"):
        recognise(state)


def test_detectron2_with_other_pixels():
    state = tensors(detector("mask_rcnn"), "detectron2")
    state["pixel_mean"] = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1)
    assert same_tensors(tensors(state, "mmdet"), detector("mask_rcnn"))
    state["pixel_mean"] = state["pixel_mean"].flip(0)
    with pytest.raises(UsageError, match="RGB"):
        recognise(state)


RESNET = {"conv1.weight": torch.ones(64, 3, 7, 7), "layer1.0.conv1.weight": torch.ones(1)}


@pytest.mark.parametrize(
    "checkpoint, reason",
    [
        ({}, "empty dict"),
        ({"state_dict": {}}, "empty dict"),
        ([1, 2], "type list"),
        ({"epoch": 3}, "no tensors, but epoch"),
        ({"state_dict": {"a": "text"}}, "a is of type str"),
        ({"state_dict": {"a": torch.ones(2).to_sparse()}}, "sparse"),
        (
            {"state_dict": RESNET},
            "no ELSA-Swin or ELSA-VOLO, nor a Swin or VOLO: its tensors have names like conv1",
        ),
        ({f"backbone.{n}": t for n, t in swin().items()} | {"neck.x": torch.ones(1)}, "stock Swin"),
        ({**swin(), "layers.0.blocks.0.attn.logit_scale": torch.ones(1)}, "Swin V2"),
    ],
)
def test_what_is_no_elsa_swin(checkpoint, reason):
    with pytest.raises(UsageError) as caught:
        recognise(checkpoint)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "checkpoint, to",
    [
        (detector("mask_rcnn"), "mmseg"),
        (detector("upernet"), "mmdet"),
        (detector("upernet"), "mmpretrain"),
        (classifier_tensors(), "detectron2"),
        (classifier_tensors(), "mmdet"),
    ],
)
def test_impossible_targets_name_the_possible_ones(checkpoint, to):
    with pytest.raises(UsageError, match=f"which can become .*backbone.* got the target {to}"):
        tensors(checkpoint, to)


def test_unknown_targets_are_refused():
    with pytest.raises(UsageError, match=", ".join(TARGETS)):
        tensors(detector("upernet"), "jax")
