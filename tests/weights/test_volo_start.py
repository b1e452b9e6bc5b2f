"""Public weights of VOLO as a warm start for ELSA-VOLO."""

import pytest
import torch
from volo_weights import SMALL, stock
from weights_models import save

from elsa_core import VOLO_VARIANTS, ELSAVolo, ELSAVoloClassifier, ELSAVoloTokens
from elsa_core.runtime.errors import UsageError
from elsa_core.weights import convert, convert_file, load_backbone, recognise, report, safetensors

timm = pytest.importorskip("timm")
# What the first stage has and VOLO lacks.
NEW = ("ghost_head", "attn.0.weight", "attn.0.bias", "attn.2.weight", "attn.2.bias")
ARCH = {**vars(SMALL), "num_heads": (3, 4), "kernel_size": 5, "group_width": 8}


def compare(model, before, source, parts=()):
    """That all of a VOLO is in a model, but for what ELSA has instead, which is as ``before``.

    ``parts`` of the model are not in the source, and as before, too.
    """
    for name, value in model.state_dict().items():
        stem, _, leaf = name.partition(".attn.")
        local = name.startswith("network.0.") and ".attn." in name
        if (local and leaf in NEW) or name.split(".")[0] in parts:
            wanted = before[name]
        elif local and leaf == "pre_proj.weight":
            values = source[f"{stem}.attn.v.weight"][..., None, None]
            wanted = torch.cat([before[name][: -len(values)], values])
        elif local:
            wanted = source[name.replace("post_proj", "proj")]
        else:
            wanted = source[name]
        assert torch.equal(value, wanted), name


def loaded(model, path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return before, load_backbone(model, path)


OUTPUTS = ("norm0", "norm1", "norm2", "norm3", "upsample")
FORMS = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "module": lambda state: {"state_dict": {f"module.{n}": t for n, t in state.items()}},
    "plain": dict,
    "timm's wrapper": lambda state: {f"backbone.timm_model.{n}": t for n, t in state.items()},
}


@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
def test_files_of_volo(tmp_path, form):
    source = stock().state_dict()
    path = tmp_path / "volo.pth.tar"
    with path.open("wb") as file:
        if form == "safetensors":
            safetensors.save(file, source, {})
        else:
            torch.save(FORMS[form](source), file)
    model = ELSAVolo(ARCH, img_size=112, pyramid=True)
    before, _ = loaded(model, path)
    compare(model, before, source, OUTPUTS)


@pytest.mark.parametrize("ema", [None, False, True])
def test_averaged_weights_of_volo(ema):
    states = {"state_dict": stock().state_dict(), "state_dict_ema": stock().state_dict()}
    got = convert(recognise(states, ema=ema), "backbone").tensors["pos_embed"]
    assert torch.equal(got, states["state_dict_ema" if ema else "state_dict"]["pos_embed"])


@pytest.mark.parametrize("name", VOLO_VARIANTS)
def test_only_the_attention_of_the_first_stage_is_new(name):
    with torch.device("meta"):
        state = timm.create_model(f"{name}_224").state_dict()
        wanted = ELSAVoloClassifier(name).state_dict()
    given = {n: torch.zeros((), dtype=t.dtype).expand(t.shape) for n, t in state.items()}
    source = recognise(given)
    assert source.arch == VOLO_VARIANTS[name]
    result = convert(source, "mmpretrain")
    tensors = {in_core(n): tensor for n, tensor in result.tensors.items()}
    absent = {in_core(n) for n, _ in result.absent}
    assert tensors.keys() | absent == wanted.keys() and not tensors.keys() & absent
    assert {n.partition(".attn.")[2] for n in absent} == set(NEW)
    assert all(n.startswith("network.0.") for n in absent)
    assert all(tensor.shape == wanted[n].shape for n, tensor in tensors.items())
    assert recognise(result.tensors).arch == VOLO_VARIANTS[name]


def in_core(name):
    """The name that a tensor of MMPretrain has in `ELSAVoloClassifier`."""
    name = name.removeprefix("backbone.").replace("head.aux_fc.", "aux_head.")
    return name.replace("head.fc.", "head.")


def test_the_real_d1(tmp_path):
    source = timm.create_model("volo_d1_224").state_dict()
    model = ELSAVoloClassifier("volo_d1")
    before, result = loaded(model, save(tmp_path, source))
    compare(model, before, source)
    dropped = [name for name, why in result.dropped if why == "ELSA replaces outlook attention"]
    assert dropped == [n for n in source if n.startswith("network.0.") and ".attn.attn." in n]


OPTIONS = {
    "three classes": dict(num_classes=3),
    "no auxiliary head": dict(use_aux_head=False),
    "no class token": dict(post_layers=None, use_aux_head=False, global_pool="avg"),
    "no classes": dict(num_classes=0, use_aux_head=False),
    "another size": dict(img_size=160),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fine_tuned_models(tmp_path, options):
    source = stock(**options).state_dict()
    path = save(tmp_path, source)
    grid = source["pos_embed"].shape[1]
    for make in (ELSAVolo, ELSAVoloTokens):
        model = make(ARCH, img_size=16 * grid)
        before, _ = loaded(model, path)
        parts = {n.split(".")[0] for n in before} - {n.split(".")[0] for n in source}
        compare(model, before, source, parts)


def test_other_settings_of_elsa(tmp_path):
    source = stock().state_dict()
    settings = dict(group_width=16, kernel_size=7, lam=0, gamma=0)
    model = ELSAVolo({**ARCH, **settings}, img_size=112)
    before, result = loaded(model, save(tmp_path, source))
    compare(model, before, source, OUTPUTS)
    assert "keep the model's initialisation" in report.text(result)


def test_a_converted_file(tmp_path):
    """It is the same each time, and loads as VOLO itself does."""
    source = stock().state_dict()
    path = save(tmp_path, source)
    for name in ("a.pth", "b.pth"):
        result = convert_file(path, tmp_path / name, "backbone")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert "drawn as PyTorch initialises convolutions, with a fixed seed" in report.text(result)
    assert "ELSA-VOLO is a reconstruction: no official code or weights exist" in report.text(result)
    for name, rows in result.seeds.items():
        new = result.tensors[name][: -len(rows)]
        assert 0.9 * 24**-0.5 < new.abs().max() <= 24**-0.5
        assert torch.equal(result.tensors[name][-len(rows) :].flatten(1), rows)
    model = ELSAVolo(ARCH, img_size=112)
    before, _ = loaded(model, tmp_path / "a.pth")
    compare(model, before, source, OUTPUTS)
    other = recognise(torch.load(tmp_path / "a.pth"))
    assert report.record(convert(other, "backbone"))["arch"]["num_heads"] == [None, None]
    half = {n: t.half() if t.is_floating_point() else t for n, t in source.items()}
    assert {t.dtype for t in convert(recognise(half), "backbone").tensors.values()} == {
        *(torch.half, torch.long)
    }


def refused(change, to="backbone", **options):
    state = stock(**options).state_dict()
    change(state)
    with pytest.raises(UsageError) as caught:
        convert(recognise(state), to)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, shape, sentence",
    [
        ("network.0.0.attn.v.weight", None, "1 tensor is missing: network.0.0.attn.v.weight"),
        ("network.0.0.attn.proj.bias", None, "1 tensor is missing: network.0.0.attn.proj.bias"),
        ("network.0.0.attn.v.weight", (24, 12), "network.0.0.attn.v.weight must have [24, 24]"),
        ("network.0.0.attn.attn.weight", (3 * 5**4, 24), "over 3x3 positions, got 1875"),
        ("network.4.0.mlp.fc1.bias", (3,), "network.4.0.mlp.fc1.bias must have [80], got [3]"),
        ("extra", (3,), "no place for 1 tensor: extra"),
        ("decode_head.conv_seg.weight", (3,), "a detector or segmentor with a stock VOLO"),
    ],
)
def test_damaged_volo(name, shape, sentence):
    def change(state):
        state.pop(name, None)
        if shape:
            state[name] = torch.ones(shape)

    assert sentence in refused(change)


def test_what_volo_cannot_become():
    for to in ("original", "detectron2", "mmdet", "mmseg"):
        message = refused(lambda state: None, to)
        assert "stock VOLO, classifier, VOLO custom, which can become backbone or mmpret" in message
    assert "post_network.1" in refused(lambda state: None, "mmpretrain", post_layers=("ca",))


def test_not_a_number():
    def change(state):
        state["network.0.0.attn.v.weight"][0] = torch.inf

    assert "pre_proj" in refused(change)
