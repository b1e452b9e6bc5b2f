"""`load_from`, --resume and tools/test.py take every form of checkpoint, or refuse it."""

import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mm_tiny import CONFIGS, REPOSITORY, options
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader, IterBasedTrainLoop, get_priority

from elsa_core.runtime.errors import UsageError
from elsa_core.weights import convert, read_checkpoint, recognise, safetensors
from elsa_mm import WeightsHook
from elsa_mm.checkpoint import read_checked_files
from elsa_mm.history import from_plain, to_plain
from elsa_mm.loading import check_weights

ARCH = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
TINY = {
    "mmdet": dict(backbone=dict(arch=ARCH), neck=dict(in_channels=[8, 16, 32, 64])),
    "mmseg": dict(
        backbone=dict(arch=ARCH),
        decode_head=dict(in_channels=[8, 16, 32, 64], channels=8),
        auxiliary_head=dict(in_channels=32, channels=8),
    ),
    "mmpretrain": dict(backbone=dict(arch=ARCH), head=dict(in_channels=64)),
}
STATE = dict(meta=dict(epoch=0, iter=2), message_hub={})


def build(framework, **changes):
    classifier = REPOSITORY / "configs/mmpretrain/digits/elsa-swin_digits.py"
    cfg = Config.fromfile(CONFIGS.get(framework, classifier))
    cfg.merge_from_dict({"model": TINY[framework]})
    cfg.merge_from_dict(changes)
    with DefaultScope.overwrite_default_scope(framework):
        return MODELS.build(cfg.model)


@pytest.fixture(scope="module")
def models():
    return {framework: build(framework) for framework in CONFIGS}


def load(model, content, resume=False):
    """As MMEngine's runner; returns the state dict that the model gets, and the log."""
    said = []
    runner = SimpleNamespace(model=model, _load_from="a.pth", _resume=resume)
    runner.logger = SimpleNamespace(info=said.append)
    WeightsHook().after_load_checkpoint(runner, checkpoint=content)
    return content["state_dict"], said


def prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


FORMS = {
    "detectron2": lambda state: convert(recognise(state), "detectron2", anchor_sizes=2).tensors,
    "_orig_mod.": prefixed("_orig_mod."),
    "model.": prefixed("model."),
    "module._orig_mod.": prefixed("module._orig_mod."),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("framework", CONFIGS)
def test_forms(models, framework, form):
    model = models[framework]
    state = model.state_dict()
    loaded, said = load(model, {"state_dict": FORMS[form](state)})
    count = len(list(model.parameters()))
    for name, _ in model.named_parameters():
        assert torch.equal(loaded[name], state[name])
    assert said == [
        f"the checkpoint a.pth, converted to the names of the model, has {count} of the {count} "
        "parameters of the model and 100% of the weights of ELSA-Swin's attention"
    ]


@pytest.mark.parametrize("form", ["_orig_mod.", "original"])
def test_classifiers(form):
    model = build("mmpretrain")
    state = model.state_dict()
    given = convert(recognise(dict(state)), form).tensors if form == "original" else state
    loaded, (said,) = load(model, {"state_dict": FORMS.get(form, dict)(given)})
    assert all(torch.equal(loaded[name], state[name]) for name, _ in model.named_parameters())
    assert said.startswith("the checkpoint a.pth, converted to the names of the model, has 81 of ")


def test_averaged_weights_are_taken_from_what_was_converted():
    assert get_priority(WeightsHook.priority) < get_priority(EMAHook.priority)


@pytest.mark.parametrize("wrapped", [True, False])
def test_own_names_are_left_alone(models, wrapped):
    state = models["mmseg"].state_dict()
    content = {"state_dict": state} if wrapped else dict(state)
    loaded, said = load(models["mmseg"], content)
    assert said == [] and (loaded is state or not wrapped) and loaded.keys() == state.keys()


@pytest.mark.parametrize("alone", [True, False])
def test_the_backbone_of_another_model(models, alone):
    """Of a file with the bare backbone, and of Detectron2's detector in a segmentor."""
    state = models["mmdet"].backbone.state_dict()
    given = state if alone else FORMS["detectron2"](models["mmdet"].state_dict())
    loaded, (said,) = load(models["mmseg"], {"model": dict(given)})
    assert loaded.keys() == {f"backbone.{name}" for name in state}
    assert all(torch.equal(loaded[f"backbone.{name}"], state[name]) for name in state)
    count = len(list(models["mmseg"].parameters()))
    assert f" has {len(state)} of the {count} parameters of the model and 100% of " in said


def test_fine_tuning_with_other_classes(models):
    other = build("mmdet", **{"model.roi_head.bbox_head.num_classes": 3})
    state = models["mmdet"].state_dict()
    loaded, (said,) = load(other, {"state_dict": dict(state)})
    assert loaded.keys() == state.keys()
    count = len(list(other.parameters()))
    assert said.startswith(f"the checkpoint a.pth has {count - 4} of the {count} parameters of ")


@pytest.mark.parametrize("stored", [["b", "a"], ["a", "b"], ["a"], None], ids=str)
def test_class_layers_of_other_classes_are_named(models, stored):
    """Only where the layers are loaded, and a training begins."""
    model, said = models["mmseg"], []
    loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
    dataset = SimpleNamespace(metainfo=dict(classes=("a", "b")))
    loop.dataloader = SimpleNamespace(dataset=dataset)
    content = {"state_dict": model.state_dict(), "meta": dict(dataset_meta=dict(classes=stored))}
    runner = SimpleNamespace(model=model, _load_from="a.pth", _resume=False, _train_loop=loop)
    runner.logger = SimpleNamespace(info=said.append, warning=said.append)
    WeightsHook().after_load_checkpoint(runner, checkpoint=content)
    sentence = "the checkpoint a.pth: its class 0 is 'b', and 'a' in the training data: "
    assert [text for text in said if sentence in text] == said
    assert len(said) == (stored == ["b", "a"])


def strangers(models):
    other = build(
        "mmdet",
        **{"model.backbone.arch.embed_dim": 32, "model.neck.in_channels": [32, 64, 128, 256]},
    )
    return {
        "resnet": {"conv1.weight": torch.zeros(2), "bn1.weight": torch.zeros(2)},
        "other backbone": FORMS["detectron2"](other.state_dict()),
        "same names": other.state_dict(),
        "heads alone": {
            name: tensor
            for name, tensor in models["mmdet"].state_dict().items()
            if not name.startswith("backbone.")
        },
    }


SENTENCES = {
    "resnet": "the model, whose names begin with backbone.patch_embed.proj.weight, "
    "backbone.patch_embed.proj.bias: a.pth cannot be converted: it holds no ELSA-Swin "
    "or ELSA-VOLO, nor a Swin or VOLO: its tensors have names like conv1.weight, bn1.weight",
    "other backbone": "its names begin with backbone.bottom_up.patch_embed.",
    "same names": "by name and shape, it has ",
    "heads alone": "its tensors have names like neck.lateral_convs.0.conv.weight",
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_what_matches_nothing_is_refused(models, kind):
    with pytest.raises(UsageError) as error:
        load(models["mmdet"], {"model": strangers(models)[kind], "meta": {}})
    assert str(error.value).startswith("the checkpoint a.pth does not match the model")
    assert SENTENCES[kind] in str(error.value)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_names_that_a_terminal_obeys_are_refused(models, key):
    state = {**models["mmseg"].state_dict(), "\x1b[2J\u202e": torch.ones(1)}
    with pytest.raises(UsageError, match="control characters") as refused:
        load(models["mmseg"], {key: state})
    assert str(refused.value).isprintable()


def test_a_model_with_another_backbone():
    model = torch.nn.Linear(2, 3)
    loaded, said = load(model, {"module.weight": torch.zeros(3, 2)})
    assert said == ["the checkpoint a.pth has 1 of the 2 parameters of the model"]
    with pytest.raises(UsageError, match="it has 0 of .* begin with fc.weight, the model's with"):
        load(model, {"state_dict": {"fc.weight": torch.zeros(3, 2)}})


@pytest.mark.parametrize("form", ["_orig_mod.", "detectron2"])
def test_resumption(models, form):
    model = models["mmdet"]
    state = FORMS[form](model.state_dict())
    with pytest.raises(UsageError, match=r"a.pth cannot be resumed from, it lacks meta\.epoch of"):
        load(model, {"model": state}, resume=True)
    if form != "detectron2":
        loaded, _ = load(model, {"state_dict": state, **STATE}, resume=True)
        assert loaded.keys() == model.state_dict().keys()
        averaged = {"state_dict": state, "ema_state_dict": state, **STATE}
        with pytest.raises(UsageError, match="cannot be resumed from: its names are not the model"):
            load(model, averaged, resume=True)


@pytest.mark.parametrize("suffix", ["pkl", "safetensors"])
def test_files_that_are_not_of_torch(models, tmp_path, suffix):
    state = FORMS["detectron2"](models["mmdet"].state_dict())
    path = str(tmp_path / f"a.{suffix}")
    if suffix == "pkl":
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        Path(path).write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    else:
        with open(path, "wb") as file:
            safetensors.save(file, state, {})
    check_weights(models["mmdet"], path, read_checkpoint(path))
    loaded, _ = load(models["mmdet"], CheckpointLoader.load_checkpoint(path))
    wanted = models["mmdet"].state_dict()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("form", ["_orig_mod.", "detectron2"])
def test_evaluated_checkpoints_take_every_form(models, form, tmp_path):
    path = str(tmp_path / "a.pth")
    state = FORMS[form](models["mmdet"].state_dict())
    torch.save({"model" if form == "detectron2" else "state_dict": state}, path)
    check_weights(models["mmdet"], path, read_checkpoint(path))
    torch.save({"state_dict": dict(list(state.items())[:-1])}, path)
    with pytest.raises(UsageError, match="a.pth (does not match the model: it lacks 1|.*missing)"):
        check_weights(models["mmdet"], path, read_checkpoint(path))


def test_load_from_is_refused_by_the_tool(refusal, digits, tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(2)}}, tmp_path / "resnet.pth")
    values = options("mmdet", digits, load_from=tmp_path / "resnet.pth")
    sentence = refusal("train", CONFIGS["mmdet"], *values)
    assert sentence.startswith(f"the checkpoint {tmp_path / 'resnet.pth'} does not match the model")
    assert not list(tmp_path.glob("work_dirs/*/*.pth"))


def test_the_log_of_a_training_survives_a_checkpoint_unchanged():
    """As tensors and plain numbers, and as older checkpoints have it."""
    losses = HistoryBuffer([0.1, 2.0, float("nan")], [1, 1, 2], max_length=3)
    hub = dict(
        log_scalars={"train/loss": losses, "empty": HistoryBuffer()},
        runtime_info=dict(best=np.float64(0.25), at=np.arange(2), kept=[2, np.int64(4)], name="a"),
        resumed_keys={"train/loss": True},
    )
    file = io.BytesIO()
    torch.save(to_plain(hub), file)
    file.seek(0)
    for read in (from_plain(torch.load(file, weights_only=True)), from_plain(hub)):
        for name, buffer in hub["log_scalars"].items():
            again = read["log_scalars"][name]
            assert isinstance(again, HistoryBuffer) and again.max_length == buffer.max_length
            for part, known in zip(again.data, buffer.data, strict=True):
                np.testing.assert_array_equal(part, known)
                assert part.dtype == known.dtype
        assert read["resumed_keys"] == hub["resumed_keys"]
        assert read["runtime_info"]["best"] == 0.25 and read["runtime_info"]["kept"] == [2, 4]


def test_local_files_are_read_by_one_reader(tmp_path, monkeypatch):
    """Whatever MMEngine's version passes to `torch.load`."""
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))
    read_checked_files()
    old = dict(meta=dict(iter=1), message_hub=dict(log_scalars={"loss": HistoryBuffer([1.0], [1])}))
    torch.save(old, tmp_path / "old.pth")
    hub = from_plain(CheckpointLoader.load_checkpoint(str(tmp_path / "old.pth"))["message_hub"])
    assert hub["log_scalars"]["loss"].current() == 1.0
    torch.save(dict(state_dict=Path("x"), more=pytest.raises), tmp_path / "bad.pth")
    with pytest.raises(UsageError, match="would execute code"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "bad.pth"))
    with pytest.raises(UsageError, match="none.pth cannot be read: No such file"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "none.pth"))
