"""Checkpoints of ELSA-VOLO become those of another framework, and back."""

import re

import pytest
import torch
from volo_weights import NATIVE, PYRAMID, SMALL, bare, classifier, detector
from weights_models import KINDS, MM, converted, fill, save, sizes
from weights_models import same as same_tensors

from elsa_core import VOLO_VARIANTS, ELSAVolo, ELSAVoloClassifier, ELSAVoloTokens
from elsa_core.runtime.errors import UsageError
from elsa_core.variants import VoloArch
from elsa_core.weights import (
    convert,
    convert_file,
    load_backbone,
    read_checkpoint,
    recognise,
    report,
)
from elsa_core.weights.shapes import backbone_shapes, read_backbone
from elsa_core.weights.volo import Volo

every_kind = pytest.mark.parametrize("kind", KINDS)
both_forms = pytest.mark.parametrize("volo", [NATIVE, PYRAMID], ids=["native", "pyramid"])


def built(make, *arguments, **options):
    with torch.device("meta"):
        state = make(*arguments, **options).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


SETTINGS = [
    dict(kernel_size=3, group_width=3, lam=lam, gamma=gamma, qkv_bias=bool(lam))
    for lam in (0, 1)
    for gamma in (0, 1)
]
ARCHS = {
    **VOLO_VARIANTS,
    "small": SMALL,
    **{str(i): VoloArch((2, 1, 1, 3), (12, 20), (2, 1), 4, 5, **s) for i, s in enumerate(SETTINGS)},
}


@pytest.mark.parametrize("pyramid", [False, True], ids=["native", "pyramid"])
@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_shapes_follow_from_a_few_tensors(arch, pyramid):
    shapes = built(ELSAVolo, arch, img_size=256, pyramid=pyramid)
    state = {f"backbone.{n}": torch.empty(shape, device="meta") for n, shape in shapes.items()}
    unknown = () if arch in VOLO_VARIANTS.values() else (1,)
    if arch.lam and not arch.gamma:  # one set of filters counts as additive
        arch = VoloArch(**{**vars(arch), "lam": 0, "gamma": 1})
    volo = Volo(arch, 16, pyramid, unknown)
    assert read_backbone(state, "backbone.") == volo
    assert backbone_shapes(volo) == shapes


@pytest.mark.parametrize(
    "options", [{}, dict(aux_head=False), dict(aux_head=False, class_token=False)]
)
def test_parts_of_classifiers_are_those_of_the_model(options):
    shapes = built(ELSAVoloClassifier, SMALL, 10, img_size=112, **options)
    assert {name: tuple(t.shape) for name, t in classifier(**options).items()} == shapes
    state = fill(shapes)
    there = converted(state, "mmpretrain")
    expected = {re_named(name): shape for name, shape in shapes.items()}
    assert {name: tuple(t.shape) for name, t in there.items()} == expected
    assert same_tensors(converted(there, "original"), state)


def re_named(name):
    if name.startswith(("head.", "aux_head.")):
        return "head." + name.replace("head.", "fc.")
    return f"backbone.{name}"


def test_heads_of_the_global_stages_are_not_guessed():
    known = recognise(classifier(VOLO_VARIANTS["volo_d1"], 10, 14))
    assert known.arch == VOLO_VARIANTS["volo_d1"]
    text = report.text(convert(known, "original"))
    assert "heads 6-12" in text and "taken as VOLO's of these sizes" in text
    other = convert(recognise(classifier()), "original")
    text = report.text(other)
    assert "heads 3-unknown" in text and "which must be given to the model" in text
    assert report.record(other)["arch"]["num_heads"] == [3, None]


def test_other_heads_than_a_variants_are_named(tmp_path, caplog, monkeypatch):
    arch = VoloArch(**{**vars(SMALL), "num_heads": (3, 4)})
    monkeypatch.setitem(VOLO_VARIANTS, "volo_small", arch)
    path = save(tmp_path, classifier())
    load_backbone(ELSAVolo(arch, img_size=112), path)
    assert not caplog.messages
    load_backbone(ELSAVolo({**vars(arch), "num_heads": (3, 8)}, img_size=112), path)
    assert "the model has (3, 8) heads, and VOLO of these sizes (3, 4)" in caplog.text


@every_kind
@both_forms
def test_round_trips_are_exact(tmp_path, kind, volo):
    first = detector(kind, volo)
    path = save(tmp_path, {"state_dict": first})
    there = convert_file(path, tmp_path / "d2.pth", "detectron2")
    assert there.source.backbone == volo and there.sizes == sizes(kind)
    convert_file(tmp_path / "d2.pth", tmp_path / "mm.safetensors", MM[kind])
    back = read_checkpoint(tmp_path / "mm.safetensors")["state_dict"]
    assert same_tensors(back, first)
    wanted = {n.removeprefix("backbone."): t for n, t in first.items() if n[:9] == "backbone."}
    for state in ({"model": there.tensors}, first, wanted):
        assert same_tensors(converted(state, "backbone"), wanted)
    with pytest.raises(UsageError, match="got the target original; no original release of ELSA-V"):
        convert(there.source, "original")


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "module"])
def test_a_classifier_initialises_backbones(tmp_path, wrapped):
    first = classifier()
    state = {f"module.{n}": t for n, t in first.items()} if wrapped else first
    path = save(tmp_path, {"state_dict": state, "state_dict_ema": classifier(seed=1)})
    convert_file(path, tmp_path / "b.pth", "backbone", ema=False)
    for make in (ELSAVolo, lambda *a, **k: ELSAVolo(*a, pyramid=True, **k)):
        for file in (path, tmp_path / "b.pth"):
            model = make(SMALL, img_size=112)
            before = {n: t.clone() for n, t in model.state_dict().items()}
            load_backbone(model, file)
            for name, value in model.state_dict().items():
                new = name.startswith(("norm", "upsample"))
                assert torch.equal(value, before[name] if new else first[name]), name
    result = load_backbone(model, path)
    reasons = dict(result.dropped)
    assert {n.split(".")[0] for n in reasons} == {
        *("cls_token", "post_network", "norm", "head", "aux_head")
    }
    assert set(reasons.values()) == {"part of the classifier, not of the backbone"}
    assert {name.split(".")[0] for name, _ in result.absent} == {
        *("norm0", "norm1", "norm2", "norm3", "upsample")
    }


def test_outputs_that_a_backbone_lacks_are_reported(tmp_path):
    path = save(tmp_path, ELSAVolo(SMALL, img_size=112).state_dict())
    result = load_backbone(ELSAVolo(SMALL, img_size=112, pyramid=True), path)
    lacking = {name for name, reason in result.absent if "does not have" in reason}
    assert lacking == {"norm0", "norm1", "norm2", "norm3", "upsample"}


def test_a_classifier_initialises_classifiers(tmp_path):
    first = classifier()
    path = save(tmp_path, first)
    whole, tokens = ELSAVoloClassifier(SMALL, 10, img_size=112), ELSAVoloTokens(SMALL, img_size=112)
    for model in (whole, tokens):
        load_backbone(model, path)
        assert all(torch.equal(t, first[n]) for n, t in model.state_dict().items())
    other = ELSAVoloClassifier(SMALL, 7, img_size=112)
    before = other.head.weight.clone()
    result = load_backbone(other, path)
    assert torch.equal(other.head.weight, before) and torch.equal(
        other.norm.bias, first["norm.bias"]
    )
    assert dict(result.dropped)["aux_head.bias"] == "the model has another number of classes"
    alone = ELSAVolo(SMALL, img_size=112, out_indices=(3,))
    load_backbone(alone, path)
    assert torch.equal(alone.norm3.weight, first["norm.weight"])


def test_outputs_of_another_form_stay_new(tmp_path):
    path = save(tmp_path, bare(NATIVE))
    model = ELSAVolo(SMALL, img_size=112, pyramid=True)
    result = load_backbone(model, path)
    assert torch.equal(model.pos_embed, bare(NATIVE)["pos_embed"])
    assert model.norm2.weight.unique().tolist() == [1]
    dropped = {name for name, why in result.dropped if "with or without a pyramid" in why}
    assert dropped == {f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")}


def test_the_form_of_fewer_outputs_is_told_by_their_norms(tmp_path):
    states = {
        pyramid: ELSAVolo(SMALL, img_size=112, pyramid=pyramid, out_indices=(1, 2, 3)).state_dict()
        for pyramid in (False, True)
    }
    for pyramid, state in states.items():
        state["norm2.bias"].fill_(7)
        path = save(tmp_path, state)
        for other in (False, True):
            model = ELSAVolo(SMALL, img_size=112, pyramid=other)
            load_backbone(model, path)
            assert bool((model.norm2.bias == 7).all()) == (pyramid == other)


def test_position_embeddings_are_resized_in_models_only(tmp_path):
    path = save(tmp_path, classifier(grid=9))
    assert converted(classifier(grid=9), "mmpretrain")["backbone.pos_embed"].shape[1] == 9
    small, same = ELSAVolo(SMALL, img_size=112), ELSAVolo(SMALL, img_size=144)
    load_backbone(small, path)
    load_backbone(same, path)
    assert torch.equal(same.pos_embed, classifier(grid=9)["pos_embed"])
    wanted = torch.nn.functional.interpolate(
        same.pos_embed.permute(0, 3, 1, 2), (7, 7), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(small.pos_embed.permute(0, 3, 1, 2), wanted)


# --- refusals


def refused(change, checkpoint=None, to="mmpretrain"):
    state = checkpoint or classifier()
    change(state)
    with pytest.raises(UsageError) as caught:
        converted(state, to)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, shape, sentence",
    [
        ("network.2.0.attn.proj.bias", None, "1 tensor is missing: network.2.0.attn.proj.bias"),
        ("cls_token", None, "1 tensor is missing: cls_token"),
        ("norm.bias", (39,), r"norm.bias must have \[40\], got \[39\]"),
        ("aux_head.weight", (10, 39), "aux_head.weight must have"),
        (
            "network.0.0.attn.attn.0.weight",
            None,
            "tensor network.0.0.attn.attn.0.weight is mis",
        ),
        ("network.0.0.attn.pre_proj.weight", (60, 24, 1, 1), r"must have \[56, 24, 1, 1\], got"),
        ("network.0.0.attn.pre_proj.bias", (56,), "no place for 1 tensor"),
        ("network.5.0.norm1.bias", (40,), "no place for 1 tensor: network.5"),
        ("network.0.0.mlp.fc1.weight", (49, 24), "a multiple of 24 hidden channels, got 49"),
        ("pos_embed", (1, 7, 8, 40), "pos_embed must have as many rows as columns, got the shape"),
        ("pos_embed", (1, 0, 0, 40), "pos_embed must have 4 dimensions, none of size 0"),
        ("pos_embed", (7, 7, 40), "pos_embed must have 4 dimensions"),
        ("pos_embed", None, "the tensor pos_embed is missing"),
        ("post_network.2.norm1.bias", (40,), "no place for 1 tensor: post_network.2"),
    ],
)
def test_damaged_classifiers(name, shape, sentence):
    def change(state):
        state.pop(name, None)
        if shape:
            state[name] = torch.ones(shape)

    assert re.search(sentence, refused(change))


def test_one_block_of_class_attention():
    def change(state):
        for name in [name for name in state if name.startswith("post_network.1.")]:
            del state[name]

    assert "are missing, the first is post_network.1.norm1.weight" in refused(change)
    state = classifier()
    change(state)
    assert converted(state, "backbone")  # does not have it


def test_numbers_that_are_none():
    def change(state):
        state["network.3.0.attn.qkv.weight"][0, 0] = torch.nan

    assert "network.3.0.attn.qkv.weight" in refused(change, to="backbone")


def test_a_backbone_without_the_last_stages(tmp_path):
    state = ELSAVolo(SMALL, out_indices=(0, 1)).state_dict()
    with pytest.raises(UsageError, match="has 1, 2, 0, 0 blocks in VOLO's four stages: it"):
        recognise(state)


@pytest.mark.parametrize("change", [dict(depths=(1, 1, 1, 1)), dict(embed_dims=(24, 48))])
def test_another_architecture_is_refused(tmp_path, change):
    model = ELSAVolo({**vars(SMALL), **change}, img_size=112)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(UsageError, match="another backbone than the model: it is VOLO's names"):
        load_backbone(model, save(tmp_path, classifier()))
    assert same_tensors(model.state_dict(), before)
