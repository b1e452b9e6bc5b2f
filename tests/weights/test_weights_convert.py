"""Every tensor of a checkpoint is converted, dropped for a reason, or an error."""

import pytest
import torch
from weights_models import (
    CLASSES,
    KINDS,
    MM,
    TINY,
    classification,
    classifier_tensors,
    converted,
    detector,
    original,
    published_sizes,
    save,
    sizes,
    swin,
    with_bookkeeping,
)
from weights_models import same as same_tensors

from elsa_core import VARIANTS, ELSASwin
from elsa_core.runtime.errors import UsageError
from elsa_core.variants import Arch
from elsa_core.weights import convert, convert_file, read_checkpoint, recognise
from elsa_core.weights.shapes import backbone_shapes

every_kind = pytest.mark.parametrize("kind", KINDS)
wrapped = pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "module"])


def accounted(conversion, checkpoint):
    """That no tensor of the source is lost, and none of the target comes from nowhere."""
    names = [name for name, _ in conversion.dropped]
    assert sorted([*conversion.moved.values(), *names]) == sorted(checkpoint)
    added = [name for name, _ in conversion.added]
    assert sorted([*conversion.moved, *added]) == sorted(conversion.tensors)
    assert all(reason for _, reason in conversion.dropped + conversion.added)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tiny", "small"])
@every_kind
def test_round_trips_of_published_models_are_exact(kind, variant):
    arch = VARIANTS[variant]
    first = detector(kind, arch, published_sizes(kind))
    there = converted({"state_dict": first}, "detectron2")
    assert not there.keys() & {n for n in first if not n.startswith("backbone.")}
    back = converted({"model": there}, MM[kind])
    assert list(back) == list(first) and same_tensors(back, first)
    old = with_bookkeeping(first, arch)
    assert same_tensors(converted({"model": there}, "original"), old)
    assert same_tensors(converted({"state_dict": old}, "detectron2"), there)


@wrapped
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@every_kind
def test_files_of_the_original(tmp_path, kind, wrapped, suffix):
    path = save(tmp_path, original(kind, wrapped=wrapped))
    first = with_bookkeeping(detector(kind))
    result = convert_file(path, tmp_path / f"d2{suffix}", "detectron2")
    assert result.source.family == "original" and result.source.kind == kind
    assert result.source.arch == TINY and result.sizes == sizes(kind)
    dropped = dict(result.dropped)
    assert {"optimizer", "amp"} < dropped.keys()
    bookkeeping = [name for name in dropped if name.endswith("relative_id")]
    assert len(bookkeeping) == 2
    convert_file(tmp_path / f"d2{suffix}", tmp_path / f"mm{suffix}", MM[kind])
    convert_file(tmp_path / f"mm{suffix}", tmp_path / f"back{suffix}", "original")
    back = read_checkpoint(tmp_path / f"back{suffix}")
    assert same_tensors(back["state_dict"], first)
    if suffix == ".pth":
        assert back["meta"]["CLASSES"] == CLASSES


@every_kind
def test_every_tensor_is_accounted_for(kind):
    checkpoint = original(kind)
    for to in ("detectron2", MM[kind], "original", "backbone"):
        accounted(convert(recognise(checkpoint), to), checkpoint["state_dict"])


@every_kind
def test_element_types_are_kept(kind):
    half = {n: t.half() if t.is_floating_point() else t for n, t in detector(kind).items()}
    there = converted(half, "detectron2")
    assert {t.dtype for t in there.values()} == {t.dtype for t in half.values()}
    assert same_tensors(converted(there, MM[kind]), half)


def test_counters_of_batch_norm_are_optional():
    first = detector("cascade_mask_rcnn")
    frozen = {n: t for n, t in first.items() if not n.endswith("num_batches_tracked")}
    assert len(frozen) < len(first)
    there = converted(frozen, "detectron2")
    assert not [name for name in there if name.endswith("num_batches_tracked")]
    assert same_tensors(converted(there, "mmdet"), frozen)


@wrapped
def test_classifier_initialises_a_backbone(wrapped):
    checkpoint = classification(wrapped=wrapped)
    result = convert(recognise(checkpoint), "backbone")
    model = ELSASwin(TINY)
    model.load_state_dict(result.tensors, strict=True)
    first = classifier_tensors()
    for name, value in model.state_dict().items():
        if name.startswith("norm"):
            assert value.unique().tolist() == [1.0 if name.endswith("weight") else 0.0]
        else:
            assert torch.equal(value, first[name]), name
    assert {n for n, _ in result.dropped} > {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    accounted(result, first)


@pytest.mark.parametrize(
    "variant, wish, wanted",
    [(None, None, False), (None, True, True), ("base", None, True), ("base", False, False)],
)
def test_averaged_weights(variant, wish, wanted):
    arch = VARIANTS[variant] if variant else TINY
    source = recognise(classification(arch), ema=wish)
    assert source.ema is wanted
    _, tensor = source.tensors["head.weight"]
    assert torch.equal(tensor, classifier_tensors(arch, seed=int(wanted))["head.weight"])


def test_averaged_weights_that_are_not_there():
    with pytest.raises(UsageError, match="no EMA weights"):
        recognise(original("upernet"), ema=True)


def test_mmpretrain_and_back():
    first = classifier_tensors()
    there = converted(first, "mmpretrain")
    plain = {n: t for n, t in first.items() if not n.endswith("relative_id")}
    assert set(there) == {
        *(f"backbone.{n}" for n in plain if n.split(".")[0] not in ("norm", "head")),
        *("backbone.norm3.weight", "backbone.norm3.bias", "head.fc.weight", "head.fc.bias"),
    }
    assert torch.equal(there["backbone.norm3.bias"], first["norm.bias"])
    assert same_tensors(converted(there, "original"), first)
    backbone = {n.removeprefix("backbone."): t for n, t in there.items() if n[:4] != "head"}
    ELSASwin(TINY, out_indices=(3,)).load_state_dict(backbone, strict=True)


@every_kind
def test_backbone_of_a_whole_model(kind):
    first = detector(kind)
    wanted = {n.removeprefix("backbone."): t for n, t in first.items() if n[:9] == "backbone."}
    assert same_tensors(converted({"state_dict": first}, "backbone"), wanted)
    assert same_tensors(converted({"model": converted(first, "detectron2")}, "backbone"), wanted)
    assert same_tensors(converted(wanted, "backbone"), wanted)
    other = {**first, "bbox_head.retina_cls.weight": torch.ones(1)}
    other = {n: t for n, t in other.items() if n.startswith(("backbone.", "bbox_head."))}
    assert same_tensors(converted(other, "backbone"), wanted)


FREE = dict(embed_dim=12, depths=(1, 2), num_heads=(1, 2), group_width=4, kernel_size=5)


@pytest.mark.parametrize(
    "arch",
    [
        *VARIANTS.values(),
        TINY,
        *(Arch(**FREE, lam=lam, gamma=gamma) for lam in (0, 1) for gamma in (0, 1)),
        Arch(**{**FREE, "embed_dim": 14, "group_width": 6}, window_size=5),
    ],
)
def test_shapes_of_backbones_are_those_of_the_model(arch):
    with torch.device("meta"):
        model = ELSASwin(arch, out_indices=range(len(arch.depths)))
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert backbone_shapes(arch) == wanted


def test_ghost_filters_with_both_parts():
    arch = {**dict(embed_dim=12, depths=(1, 1), num_heads=(1, 2), group_width=4), "lam": 1}
    state = ELSASwin(arch, out_indices=(0, 1)).state_dict()
    assert state["layers.0.blocks.0.attn.ghost_head"].dim() == 5
    assert same_tensors(converted(state, "backbone"), state)


# --- stock Swin


def test_swin_attention_of_the_last_stage():
    """ELSA-Swin's last stage with the converted tensors computes what Swin's formula says."""
    state = swin()
    out = converted(state, "backbone")
    name = "layers.3.blocks.0.attn."
    model = ELSASwin(dict(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), group_width=8))
    layer = model.layers[3].blocks[0].attn
    layer.load_state_dict(
        {n.removeprefix(name): t for n, t in out.items() if n[: len(name)] == name}
    )
    layer.double()  # the numbers of the state are large
    state = {n: t.double() for n, t in state.items() if t.is_floating_point()}
    x = torch.rand(1, 7, 7, 192, dtype=torch.float64)
    qkv = x.reshape(49, 192) @ state[name + "qkv.weight"].T + state[name + "qkv.bias"]
    query, key, value = qkv.reshape(49, 3, 4, 48).permute(1, 2, 0, 3)
    where = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    delta = where[:, None] - where[None] + 6  # query minus key
    table = state[name + "relative_position_bias_table"]
    bias = table[delta[..., 0] * 13 + delta[..., 1]].permute(2, 0, 1)
    attention = (query @ key.transpose(1, 2) * 48**-0.5 + bias).softmax(-1)
    y = (attention @ value).transpose(0, 1).reshape(49, 192)
    y = y @ state[name + "proj.weight"].T + state[name + "proj.bias"]
    torch.testing.assert_close(layer(x).reshape(49, 192), y)


def test_swin_names_of_openmmlab():
    """The same numbers, with its order of the merged channels undone by nn.Unfold itself."""
    public, theirs = converted(swin(), "backbone"), converted(swin(mm=True), "backbone")
    assert public.keys() == theirs.keys()
    x = torch.rand(1, 24, 6, 6, dtype=torch.float64)
    unfolded = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    slices = [x[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    sliced = torch.cat(slices, 1).flatten(2).transpose(1, 2)
    name = "layers.0.downsample."
    ends = ("norm.weight", "reduction.weight")
    norm, reduction = (swin(mm=True)["stages.0.downsample." + end].double() for end in ends)
    expected = (unfolded * norm) @ reduction.T
    norm, reduction = (theirs[name + end].double() for end in ends)
    got = (sliced * norm) @ reduction.T
    torch.testing.assert_close(got, expected)
    others = [n for n in public if "downsample" not in n]
    assert all(torch.equal(public[n], theirs[n]) for n in others)


def test_swin_report_names_what_is_not_taken():
    state = swin()
    result = convert(recognise({"model": state}), "backbone")
    accounted(result, state)
    wanted = ELSASwin(result.source.arch).state_dict()
    absent = {name for name, _ in result.absent}
    assert absent | result.tensors.keys() == wanted.keys() and not absent & result.tensors.keys()
    assert {n.split(".")[-2] for n in absent if "ghost" not in n and "norm" not in n} == {
        *("0", "2", "pre_proj", "post_proj")
    }
    assert {t.shape for n, t in result.tensors.items()} == {wanted[n].shape for n in result.tensors}
    with pytest.raises(UsageError, match="can become backbone"):
        convert(recognise(state), "mmpretrain")


def test_swin_of_newer_timm():
    moved = {
        n.replace(f"layers.{i}.downsample", f"layers.{i + 1}.downsample"): t
        for n, t in swin().items()
        for i in [int(n.split(".")[1]) if n.startswith("layers.") else 0]
    }
    assert moved.keys() != swin().keys()
    assert same_tensors(converted(moved, "backbone"), converted(swin(), "backbone"))


# --- compiled, sharded and wrapped models


def as_without_prefix(checkpoint, kind, to="detectron2"):
    found, wanted = (convert(recognise(one), to) for one in (checkpoint, detector(kind)))
    assert list(found.tensors) == list(wanted.tensors)
    assert same_tensors(found.tensors, wanted.tensors)
    return found


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "net.detector.", "module._orig_mod."])
@every_kind
def test_prefixes(kind, prefix):
    tensors = {prefix + name: tensor for name, tensor in detector(kind).items()}
    assert not as_without_prefix({"state_dict": tensors}, kind).dropped
    as_without_prefix(tensors, kind, "backbone")


def test_compiled_and_sharded_parts():
    tensors = {}
    for name, tensor in detector("upernet").items():
        name = name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.")
        tensors[name.replace("backbone.", "backbone._orig_mod._fsdp_wrapped_module.")] = tensor
    as_without_prefix(tensors, "upernet")


def test_what_lies_beside_the_model_is_accounted_for():
    tensors = {f"model.{name}": tensor for name, tensor in detector("upernet").items()}
    found = as_without_prefix({**tensors, "criterion.weight": torch.ones(3)}, "upernet")
    reason = "outside of model., with which the model's names begin"
    assert found.dropped == [("criterion.weight", reason)]


def test_several_models_are_refused():
    both = {f"{who}.{name}": t for who in "ba" for name, t in detector("upernet").items()}
    with pytest.raises(UsageError, match="it holds several models, with the prefixes a., b."):
        recognise(both)


# --- anchors


@pytest.mark.parametrize("sizes_per_level, ratios", [(2, 2), (3, 2), (1, 4), (2, 3)])
def test_anchors_of_several_sizes(sizes_per_level, ratios):
    pytest.importorskip("detectron2")
    pytest.importorskip("mmdet")
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from mmdet.models.task_modules.prior_generators import AnchorGenerator

    scales, shapes = [8 + 3 * i for i in range(sizes_per_level)], [0.5 + i for i in range(ratios)]
    count = sizes_per_level * ratios
    theirs = AnchorGenerator([4], shapes, scales=scales).gen_base_anchors()[0]
    ours = DefaultAnchorGenerator(
        sizes=[[4 * scale for scale in scales]], aspect_ratios=[shapes], strides=[4]
    ).generate_cell_anchors([4 * scale for scale in scales], shapes)
    wanted = sizes("mask_rcnn")
    wanted.anchors = count
    first = detector("mask_rcnn", TINY, wanted)
    first["rpn_head.rpn_reg.bias"] = theirs.flatten()
    first["rpn_head.rpn_cls.bias"] = theirs.prod(1)
    there = converted(first, "detectron2", anchor_sizes=sizes_per_level)
    head = "proposal_generator.rpn_head."
    torch.testing.assert_close(there[head + "anchor_deltas.bias"].reshape(-1, 4), ours)
    torch.testing.assert_close(there[head + "objectness_logits.bias"], ours.prod(1))
    assert same_tensors(converted(there, "mmdet", anchor_sizes=sizes_per_level), first)
    if count != 3:
        with pytest.raises(UsageError, match="--anchor-sizes"):
            converted(first, "detectron2")
    with pytest.raises(UsageError, match="must divide"):
        converted(first, "detectron2", anchor_sizes=5)
