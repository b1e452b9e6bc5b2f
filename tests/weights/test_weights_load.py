"""Converted and original files where the frameworks' users expect them."""

import logging
import pickle
import re

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from weights_models import (
    KINDS,
    TINY,
    classification,
    classifier_tensors,
    detector,
    original,
    save,
    sizes,
    swin,
)

import elsa_d2
import elsa_mm
from elsa_core import ELSASwin
from elsa_core.runtime.errors import UsageError
from elsa_core.weights import convert_file, safetensors
from elsa_tools.verify import configs, d2, mm

every_kind = pytest.mark.parametrize("kind", KINDS)
suffixes = pytest.mark.parametrize("suffix", [".pth", ".safetensors"])


def detectron2(kind, *keys):
    cfg = elsa_d2.load_config(elsa_d2.get_config_file(configs.DETECTRON2[kind]))
    cfg.merge_from_list([*d2.overrides(TINY, sizes(kind), kind), "MODEL.DEVICE", "cpu", *keys])
    return build_model(cfg)


def openmmlab(kind):
    cfg = Config.fromfile(elsa_mm.get_config_file(configs.OPENMMLAB[kind]))
    mm.set_sizes(cfg.model, TINY, sizes(kind), kind)
    with DefaultScope.overwrite_default_scope("mmdet" if kind != "upernet" else "mmseg"):
        return MODELS.build(cfg.model)


def pretrained(path, arch=TINY, **options):
    """A backbone whose `init_weights` loads a file."""
    init_cfg = dict(type="Pretrained", checkpoint=str(path))
    return MODELS.build(dict(type="ELSASwin", arch=arch, init_cfg=init_cfg, **options))


def load_in_d2(model, path, checkpointer=elsa_d2.AtomicCheckpointer):
    """What Detectron2 itself has to say about missing, unknown and misfitting tensors."""
    seen = []
    loader = checkpointer(model)
    loader._log_incompatible_keys = seen.append
    loader.resume_or_load(str(path), resume=False)
    (found,) = seen
    return set(found.missing_keys), set(found.unexpected_keys), found.incorrect_shapes


def backbone_of(model):
    model = model.backbone
    return getattr(model, "bottom_up", model).state_dict()


@suffixes
@every_kind
def test_weights_of_detectron2(tmp_path, kind, suffix):
    path = save(tmp_path, original(kind))
    convert_file(path, tmp_path / f"a{suffix}", "detectron2")
    model = detectron2(kind)
    assert load_in_d2(model, tmp_path / f"a{suffix}") == (set(), set(), [])
    first = detector(kind)
    back = convert_file(tmp_path / f"a{suffix}", tmp_path / "b.pth", "original")
    assert all(torch.equal(model.state_dict()[old], first[n]) for n, old in back.moved.items())
    if suffix == ".pth":  # also without our checkpointer
        assert load_in_d2(model, tmp_path / "a.pth", DetectionCheckpointer) == (set(), set(), [])


@suffixes
@every_kind
def test_load_from_of_openmmlab(tmp_path, kind, suffix):
    elsa_d2.AtomicCheckpointer(detectron2(kind), str(tmp_path)).save("model", iteration=3)
    path = tmp_path / f"a{suffix}"
    convert_file(tmp_path / "model.pth", path, "mmseg" if kind == "upernet" else "mmdet")
    model = openmmlab(kind)
    load_checkpoint(model, str(path), map_location="cpu", strict=True)
    stored = torch.load(tmp_path / "model.pth")["model"]
    (name,) = [n for n in stored if n.endswith("fc1.bias") and "blocks" in n and "layers.0" in n]
    assert torch.equal(backbone_of(model)["layers.0.blocks.0.mlp.fc1.bias"], stored[name])


@every_kind
def test_original_detectors_and_segmentors_load_directly(tmp_path, kind):
    for content in (original(kind, wrapped=True), detector(kind)):
        model = detectron2(kind)
        assert load_in_d2(model, save(tmp_path, content)) == (set(), set(), [])
        assert torch.equal(backbone_of(model)["norm3.bias"], detector(kind)["backbone.norm3.bias"])


def heads(names):
    return {name for name in names if "bottom_up" not in name}


@pytest.mark.parametrize("kind", ["mask_rcnn", "upernet"])
def test_original_classifier_as_weights_of_detectron2(tmp_path, kind):
    model = detectron2(kind)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    missing, unknown, wrong = load_in_d2(model, save(tmp_path, classification(wrapped=True)))
    assert not unknown and not wrong
    assert missing and not [n for n in missing if ".layers." in n or ".patch_embed." in n]
    first = classifier_tensors()
    for name, value in backbone_of(model).items():
        assert name.startswith("norm") or torch.equal(value, first[name]), name
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in missing)


@pytest.mark.parametrize("checkpointer", [elsa_d2.AtomicCheckpointer, DetectionCheckpointer])
@pytest.mark.parametrize("kind", ["mask_rcnn", "upernet"])
def test_one_backbone_file_serves_both_frameworks(tmp_path, kind, checkpointer):
    path = tmp_path / "backbone.pth"
    convert_file(save(tmp_path, classification()), path, "backbone")
    wanted = torch.load(path)["state_dict"]
    model = detectron2(kind)
    _, unknown, wrong = load_in_d2(model, path, checkpointer)
    assert not wrong and not unknown
    assert all(torch.equal(value, wanted[n]) for n, value in backbone_of(model).items())
    backbone = MODELS.build(dict(type="ELSASwin", arch=TINY))
    load_checkpoint(backbone, str(path), map_location="cpu", strict=True)
    assert all(torch.equal(value, wanted[n]) for n, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    "checkpoint", [classification(), classification(wrapped=True), original("upernet")]
)
def test_original_as_pretrained_backbone_of_openmmlab(tmp_path, checkpoint):
    path = save(tmp_path, checkpoint)
    backbone = pretrained(path)
    init_cfg = dict(backbone.init_cfg)
    backbone.init_weights()
    plain = {n.removeprefix("module."): t for n, t in checkpoint["state_dict"].items()}
    for name, value in backbone.state_dict().items():
        wanted = plain.get(f"backbone.{name}", plain.get(name))
        assert name.startswith("norm") and wanted is None or torch.equal(value, wanted), name
    assert backbone.init_cfg == init_cfg and backbone.is_init


def test_pretrained_detector_of_detectron2_and_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    convert_file(save(tmp_path, original("mask_rcnn")), path, "detectron2")
    backbone = pretrained(path)
    backbone.init_weights()
    first = detector("mask_rcnn")
    assert all(torch.equal(t, first[f"backbone.{n}"]) for n, t in backbone.state_dict().items())


@pytest.mark.parametrize("converted", [False, True], ids=["itself", "converted"])
def test_warm_start_from_swin(tmp_path, converted):
    path = save(tmp_path, {"model": swin()})
    if converted:
        convert_file(path, tmp_path / "warm.pth", "backbone")
        path = tmp_path / "warm.pth"
    arch = dict(embed_dim=24, depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4], group_width=4)
    backbone = pretrained(path, arch)
    before = backbone.layers[0].blocks[0].attn.ghost_head.clone()
    backbone.init_weights()
    name = "layers.1.blocks.0.mlp.fc2.weight"
    assert torch.equal(backbone.state_dict()[name], swin()[name])
    assert torch.equal(backbone.layers[0].blocks[0].attn.ghost_head, before)


@pytest.mark.parametrize("change", [dict(depths=(1, 1, 2, 2)), dict(embed_dim=24)])
def test_another_architecture_is_refused(tmp_path, change):
    path = save(tmp_path, classification())
    arch = dict(embed_dim=12, depths=(1, 1, 1, 2), num_heads=(1, 2, 3, 4))
    arch |= dict(group_width=4, kernel_size=3, window_size=3, **change)
    backbone = pretrained(path, arch)
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    with pytest.raises(UsageError, match="another backbone than the model"):
        backbone.init_weights()
    assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items())


def test_other_models_load_as_ever(tmp_path):
    model = torch.nn.Linear(2, 3)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    other = torch.nn.Linear(2, 3)
    assert load_in_d2(other, tmp_path / "a.pth") == (set(), set(), [])
    assert torch.equal(other.weight, model.weight)


def resnet(model):
    """A detector's heads and neck under a ResNet."""
    heads = {n: t for n, t in model.state_dict().items() if ".bottom_up." not in n}
    return {**heads, "backbone.bottom_up.stem.conv1.weight": torch.ones(8, 3, 7, 7)}


def stock_swin(model):
    """Names of norms and MLPs, and their shapes, are those of ELSA-Swin."""
    heads = {n: t for n, t in model.state_dict().items() if ".bottom_up." not in n}
    tensors = swin(arch=TINY).items()
    return {**heads, **{f"backbone.bottom_up.{name}": tensor for name, tensor in tensors}}


def wider(model):
    """Only some vectors have the same shape."""
    tensors = model.state_dict().items()
    return {n: torch.zeros(2, *t.shape) if t.dim() > 2 or "proj" in n else t for n, t in tensors}


def only(part):
    return lambda model: {n: t for n, t in model.state_dict().items() if part in n}


def bare(name):
    return lambda model: {name: torch.ones(8, 3, 7, 7)}


UNMATCHED = {
    "another detector": (resnet, ".pth"),
    "another detector's pickle": (resnet, ".pkl"),
    "another detector's safetensors": (resnet, ".safetensors"),
    "another detector with nearly our names": (stock_swin, ".pth"),
    "another classifier": (bare("conv1.weight"), ".pth"),
    "other shapes": (wider, ".pth"),
    "heads alone": (only("roi_heads"), ".pth"),
    "one tensor by chance": (only("patch_embed.proj.weight"), ".pth"),
    "pixels alone": (only("pixel_mean"), ".pth"),
    "nothing": (lambda model: {}, ".pth"),
}


@pytest.mark.parametrize("make, suffix", UNMATCHED.values(), ids=UNMATCHED)
def test_weights_that_match_nothing_are_refused(tmp_path, make, suffix):
    path, model = tmp_path / f"a{suffix}", detectron2("mask_rcnn")
    tensors = make(model)
    if suffix == ".pth":
        torch.save({"model": tensors}, path)
    elif suffix == ".pkl":
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    else:
        with path.open("wb") as file:
            safetensors.save(file, tensors, {})
    with pytest.raises(
        UsageError, match=f"{path.name} (does not match the model: by|cannot be conv)"
    ):
        load_in_d2(model, path)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_detectron2s_names(tmp_path, prefix):
    first, model = detectron2("mask_rcnn").state_dict(), detectron2("mask_rcnn")
    path = save(tmp_path, {"model": {prefix + name: tensor for name, tensor in first.items()}})
    missing, unknown, wrong = load_in_d2(model, path)
    assert not unknown and not wrong and missing <= {"pixel_mean", "pixel_std"}
    assert all(torch.equal(tensor, first[name]) for name, tensor in model.state_dict().items())


def test_a_part_that_matches_is_loaded_and_counted(tmp_path, caplog):
    first, model = detectron2("mask_rcnn").state_dict(), detectron2("mask_rcnn")
    other = {n: t[:2] if "roi_heads" in n or "pre_proj" in n else t for n, t in first.items()}
    with caplog.at_level(logging.INFO):
        load_in_d2(model, save(tmp_path, {"model": other}))
    (line,) = [text for text in caplog.messages if " parameters of the model" in text]
    assert re.search(r"\d+ of the \d+ parameters of the model and [23]\d% of the weights of", line)
    name = "backbone.bottom_up.layers.0.blocks.0.mlp.fc1.weight"
    assert torch.equal(model.state_dict()[name], first[name])


@pytest.mark.parametrize("stored", [["b", "a"], ["a", "b"], ["a"], None], ids=str)
def test_class_layers_of_other_classes_are_named(tmp_path, caplog, stored):
    model = detectron2("mask_rcnn")
    content = {"model": model.state_dict(), "meta": {"dataset_meta": {"classes": stored}}}
    checkpointer = elsa_d2.AtomicCheckpointer(model)
    checkpointer.classes = ["a", "b"]
    checkpointer.resume_or_load(str(save(tmp_path, content)), resume=False)
    said = [text for text in caplog.messages if "class layers begin with the weights of" in text]
    assert len(said) == (stored == ["b", "a"])
    assert all("its class 0 is 'b', and 'a' in the training data" in text for text in said)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", "cut"], ids=str)
def test_damaged_weights_are_refused_in_a_sentence(tmp_path, content):
    model = detectron2("mask_rcnn")
    path = save(tmp_path, {"model": model.state_dict()})
    path.write_bytes(path.read_bytes()[:5000] if content == "cut" else content)
    with pytest.raises(UsageError, match=path.name):
        load_in_d2(model, path)


NOT_BUILT = "tensors of a checkpoint are not used: they come after stage 2"


@pytest.mark.parametrize("kind", ["mask_rcnn", "upernet", "classifier", "itself"])
def test_a_whole_checkpoint_without_the_last_stage_in_detectron2(tmp_path, kind, caplog):
    checkpoint = classification() if kind == "classifier" else original("mask_rcnn")
    if kind == "upernet":
        checkpoint = original(kind)
    if kind == "itself":
        checkpoint = {"model": detectron2("mask_rcnn").state_dict()}
    features = ["res2", "res3", "res4"]
    keys = [("MODEL.ELSA_SWIN.OUT_FEATURES", features), ("MODEL.FPN.IN_FEATURES", features)]
    keys += [("MODEL.RPN.IN_FEATURES", [f"p{i}" for i in range(2, 6)])]
    keys += [("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256]])]
    model = detectron2("mask_rcnn", *(part for pair in keys for part in pair))
    missing, unknown, wrong = load_in_d2(model, save(tmp_path, checkpoint))
    assert not wrong and not [name for name in missing | unknown if "bottom_up.layers" in name]
    assert [NOT_BUILT in text for text in caplog.messages].count(True) == 1
    assert not [name for name in model.state_dict() if "bottom_up.layers.3" in name]


def test_a_whole_checkpoint_without_the_last_stage_in_openmmlab(tmp_path, caplog):
    wanted = detector("mask_rcnn")
    tensors = {name: t for name, t in wanted.items() if name.startswith("backbone.")}
    backbone = MODELS.build(dict(type="ELSASwin", arch=TINY, out_indices=(0, 1, 2)))
    model = torch.nn.ModuleDict({"backbone": backbone})
    load_checkpoint(model, str(save(tmp_path, {"state_dict": tensors})), strict=True)
    assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())
    path = save(tmp_path, original("mask_rcnn"), "b.pth")
    backbone = pretrained(path, out_indices=(0, 1, 2))
    backbone.init_weights()
    assert all(torch.equal(t, wanted[f"backbone.{n}"]) for n, t in backbone.state_dict().items())
    assert [NOT_BUILT in text for text in caplog.messages].count(True) == 2


def test_a_checkpoint_without_the_last_stage_becomes_nothing_else(tmp_path):
    backbone = ELSASwin(TINY, out_indices=(0, 1, 2))
    path = save(tmp_path, backbone.state_dict())
    with pytest.raises(UsageError, match="its backbone ends with stage 2 of ELSA: it was built"):
        convert_file(path, tmp_path / "b.pth", "backbone")
