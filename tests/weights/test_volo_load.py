"""Names and shapes of ELSA-VOLO in both frameworks, and checkpoints where their users name them."""

import logging

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from detectron2.modeling import build_model
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from volo_weights import SMALL, classifier, detector, stock
from weights_models import CLASSES, KINDS, published_sizes, save, sizes

import elsa_d2
import elsa_mm
from elsa_core import VOLO_VARIANTS, ELSAVoloClassifier
from elsa_core.runtime.errors import UsageError
from elsa_core.variants import VoloArch
from elsa_core.weights import convert_file
from elsa_core.weights.names import rename
from elsa_core.weights.shapes import model_shapes, read_sizes
from elsa_core.weights.volo import Volo
from elsa_d2.checkpoint import check_checkpoint
from elsa_mm.loading import adopt, check_weights
from elsa_tools.verify import configs, d2, mm, verify

# The tensors of a variant tell its heads.
ARCH = VoloArch(**{**vars(SMALL), "num_heads": (3, 4)})
CASES = [(kind, pyramid) for kind in KINDS for pyramid in (True, False)]
CASES = [case for case in CASES if case[1] or case[0] == "upernet"]
every_model = pytest.mark.parametrize(
    "kind, pyramid", CASES, ids=[f"{k}-{'pyramid' if p else 'native'}" for k, p in CASES]
)


@pytest.fixture(autouse=True)
def variant(monkeypatch):
    monkeypatch.setitem(VOLO_VARIANTS, "volo_small", ARCH)


def detectron2(kind, volo, wanted=None, device="cpu"):
    cfg = elsa_d2.load_config(elsa_d2.get_config_file(configs.DETECTRON2[kind]))
    keys = d2.overrides(volo, wanted or sizes(kind), kind)
    cfg.merge_from_list([*keys, "MODEL.DEVICE", device])
    with torch.device(device):
        return build_model(cfg)


def openmmlab(kind, volo, wanted=None, device="cpu"):
    cfg = Config.fromfile(elsa_mm.get_config_file(configs.OPENMMLAB[kind]))
    mm.set_sizes(cfg.model, volo, wanted or sizes(kind), kind)
    with DefaultScope.overwrite_default_scope("mmdet" if kind != "upernet" else "mmseg"):
        with torch.device(device):
            return MODELS.build(cfg.model)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@every_model
def test_names_and_shapes_are_those_of_the_models(kind, pyramid):
    volo, wanted = Volo(VOLO_VARIANTS["volo_d1"], 14, pyramid), published_sizes(kind)
    theirs = shapes(openmmlab(kind, volo, wanted, "meta"))
    assert model_shapes(volo, wanted, kind) == theirs
    tensors = {name: torch.empty(shape, device="meta") for name, shape in theirs.items()}
    assert read_sizes(tensors, kind) == wanted
    ours = shapes(detectron2(kind, volo, wanted, "meta"))
    for given, side, expected in ((theirs, "d2", ours), (ours, "mm", theirs)):
        renamed, unknown = rename(given, kind, side)
        assert not unknown
        assert {name: shape for name, (_, shape) in renamed.items()} == expected


def load_in_d2(model, path):
    """What Detectron2 has to say about missing, unknown and misfitting tensors."""
    seen = []
    loader = elsa_d2.AtomicCheckpointer(model)
    loader._log_incompatible_keys = seen.append
    loader.resume_or_load(str(path), resume=False)
    (found,) = seen
    return set(found.missing_keys), set(found.unexpected_keys), found.incorrect_shapes


@every_model
def test_models_of_one_framework_in_the_other(tmp_path, kind, pyramid):
    volo = Volo(ARCH, 7, pyramid)
    path = save(tmp_path, {"state_dict": detector(kind, volo), "meta": {"CLASSES": CLASSES}})
    convert_file(path, tmp_path / "d2.pth", "detectron2")
    target = "mmseg" if kind == "upernet" else "mmdet"
    for file in (path, tmp_path / "d2.pth"):  # converted, and as it is
        model = detectron2(kind, volo)
        assert load_in_d2(model, file) == (set(), set(), [])
        wanted = detector(kind, volo)["backbone.pos_embed"]
        assert any(torch.equal(t, wanted) for n, t in model.state_dict().items() if "pos_" in n)
    back = convert_file(tmp_path / "d2.pth", tmp_path / "mm.pth", target)
    model = openmmlab(kind, volo)
    load_checkpoint(model, str(tmp_path / "mm.pth"), map_location="cpu", strict=True)
    assert all(torch.equal(t, back.tensors[n]) for n, t in model.state_dict().items())
    content = torch.load(tmp_path / "d2.pth")
    check_weights(openmmlab(kind, volo, device="meta"), "d2.pth", content)


def of_another_size(model):
    """The model's tensors, with the position embedding of larger images."""
    state = model.state_dict()
    (name,) = [name for name in state if name.endswith("pos_embed")]
    return {**state, name: torch.rand(1, 9, 9, 40)}, name


def test_position_embeddings_of_another_size(tmp_path, caplog):
    volo = Volo(ARCH, 7, True)
    state, name = of_another_size(detectron2("mask_rcnn", volo))
    path = save(tmp_path, {"model": state})
    model = detectron2("mask_rcnn", volo)
    with caplog.at_level(logging.WARNING):
        assert load_in_d2(model, path) == (set(), set(), [])
    wanted = torch.nn.functional.interpolate(
        state[name].permute(0, 3, 1, 2), (7, 7), mode="bicubic", align_corners=False
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.state_dict()[name], wanted)
    assert [f"{name} is resized from (9, 9) to (7, 7)" in t for t in caplog.messages].count(
        True
    ) == 1
    check_checkpoint(str(path), detectron2("mask_rcnn", volo, device="meta"))
    model = openmmlab("mask_rcnn", volo)
    for prefix in ("", "module."):
        state, name = of_another_size(model)
        content = {"state_dict": {prefix + n: t for n, t in state.items()}}
        assert adopt(model, content, "a.pth") == ""
        check_weights(model, "a.pth", content)
        assert content["state_dict"][prefix + name].shape == (1, 7, 7, 40)


@pytest.mark.parametrize("converted", [False, True], ids=["itself", "converted"])
@pytest.mark.parametrize("kind", ["mask_rcnn", "upernet"])
def test_volo_as_weights_of_detectron2(tmp_path, kind, converted, caplog):
    source = stock(img_size=144).state_dict()
    state = {f"module.{name}": tensor for name, tensor in source.items()}
    path = save(tmp_path, {"state_dict": state}, "volo.pth.tar")
    if converted:
        convert_file(path, tmp_path / "warm.pth", "backbone")
        path = tmp_path / "warm.pth"
    model = detectron2(kind, Volo(ARCH, 7, True))
    with caplog.at_level(logging.INFO):
        missing, unknown, wrong = load_in_d2(model, path)
    assert not unknown and not wrong
    prefix = "backbone." if kind == "upernet" else "backbone.bottom_up."
    inside = {name.removeprefix(prefix) for name in missing if name.startswith(prefix)}
    assert {name.split(".attn.")[0] for name in inside if ".attn." in name} == {"network.0.0"}
    assert {n.split(".")[0] for n in inside} == {
        "network",
        "upsample",
        *map("norm{}".format, range(4)),
    }
    part = getattr(model.backbone, "bottom_up", model.backbone)
    values = source["network.0.0.attn.v.weight"]
    assert torch.equal(part.network[0][0].attn.pre_proj.weight[-24:].flatten(1), values)
    assert [" of the weights of ELSA-VOLO's attention" in t for t in caplog.messages].count(
        True
    ) == 1


def test_a_stock_volo_of_another_size_is_refused(tmp_path):
    path = save(tmp_path, stock(layers=[1, 1, 1, 1]).state_dict())
    with pytest.raises(UsageError, match="another backbone than the model: it is stock VOLO"):
        load_in_d2(detectron2("mask_rcnn", Volo(ARCH, 7, True)), path)


def test_volo_as_init_cfg(tmp_path):
    source = stock().state_dict()
    path = save(tmp_path, source)
    convert_file(path, tmp_path / "backbone.pth", "backbone")
    convert_file(path, tmp_path / "classifier.pth", "mmpretrain")
    for file in (path, tmp_path / "backbone.pth", tmp_path / "classifier.pth"):
        for kind in ("ELSAVolo", "ELSAVoloTokens"):
            init_cfg = dict(type="Pretrained", checkpoint=str(file))
            model = MODELS.build(dict(type=kind, arch=ARCH, img_size=112, init_cfg=init_cfg))
            model.init_weights()
            assert torch.equal(model.pos_embed, source["pos_embed"])
            if kind == "ELSAVoloTokens" and file.name != "backbone.pth":
                assert torch.equal(model.cls_token, source["cls_token"])


def mmpretrain(num_classes=10):
    pytest.importorskip("mmpretrain")
    from elsa_mm.volo_head import VoloHead

    backbone = dict(type="ELSAVoloTokens", arch=ARCH, img_size=112)
    head = dict(type=VoloHead, num_classes=num_classes, in_channels=40)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return MODELS.build(dict(type="ImageClassifier", backbone=backbone, head=head))


def test_classifiers_of_mmpretrain(tmp_path):
    """From VOLO, from ELSA-VOLO's names, and back to them."""
    model = mmpretrain()
    for content, new in ((stock().state_dict(), 5), (classifier(), 0)):
        given = {"state_dict": dict(content)}
        assert "converted to the names of the model" in adopt(model, given, "a.pth")
        found = model.load_state_dict(given["state_dict"], strict=False)
        assert not found.unexpected_keys and len(found.missing_keys) == new
        assert torch.equal(model.head.aux_fc.weight, content["aux_head.weight"])
        assert torch.equal(model.backbone.norm.weight, content["norm.weight"])
    path = save(tmp_path, {"state_dict": model.state_dict()})
    convert_file(path, tmp_path / "b.pth", "original")
    core = ELSAVoloClassifier(ARCH, 10, img_size=112)
    core.load_state_dict(torch.load(tmp_path / "b.pth")["state_dict"], strict=True)
    image = torch.rand(2, 3, 112, 112)
    logits = core.eval()(image)
    assert torch.equal(model.eval()(image, mode="tensor"), logits)


def test_heads_of_other_classes_stay_new():
    model, source = mmpretrain(7), stock().state_dict()
    content = {"state_dict": dict(source)}
    note = adopt(model.to("meta"), content, "volo.pth")  # as for FSDP
    whole = sum(1 for _ in model.parameters())
    assert f"has {whole - 4 - 5} of the {whole} parameters" in note
    assert torch.equal(content["state_dict"]["backbone.cls_token"], source["cls_token"])


def test_verify_runs_the_backbone_in_both_frameworks(tmp_path):
    path = save(tmp_path, classifier(ARCH))
    conversion = convert_file(path, tmp_path / "b.pth", "backbone")
    assert verify(conversion, str(tmp_path / "b.pth")).same
    stored = torch.load(tmp_path / "b.pth")
    stored["state_dict"]["network.0.0.mlp.fc2.weight"] *= 1.2
    torch.save(stored, tmp_path / "b.pth")
    assert not verify(conversion, str(tmp_path / "b.pth")).same


def test_verify_does_not_guess_heads(tmp_path, monkeypatch):
    monkeypatch.delitem(VOLO_VARIANTS, "volo_small")
    for state, to in (
        (classifier(), "backbone"),
        (detector("upernet", Volo(SMALL, 7, True)), "mmseg"),
    ):
        conversion = convert_file(save(tmp_path, state), tmp_path / "b.pth", to)
        with pytest.raises(
            UsageError, match="the heads of the global stages are not in the tensors"
        ):
            verify(conversion, str(tmp_path / "b.pth"))
