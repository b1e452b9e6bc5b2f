"""Wrong use of tools/train.py and tools/test.py: exit status 2 and one sentence, at once."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from mm_tiny import CONFIGS, options
from mmengine.config import Config

from elsa_core.runtime.errors import UsageError
from elsa_mm import cli, preflight

frameworks = pytest.mark.parametrize("framework", CONFIGS)


def test_missing_config(refusal):
    assert refusal("train", "nothing.py") == "the config file nothing.py does not exist"


@pytest.mark.parametrize(
    "text, word",
    [
        ("_base_ = ['nothing.py']", "nothing.py"),
        ("model = dict(", "never closed"),
        ("custom_imports = dict(imports=['no_such_module'])", "no_such_module"),
    ],
)
def test_unusable_config(refusal, tmp_path, text, word):
    (tmp_path / "broken.py").write_text(text)
    sentence = refusal("train", "broken.py")
    assert sentence.startswith("the config broken.py cannot be used: ") and word in sentence


def test_an_interruption_while_the_config_is_printed(monkeypatch, tmp_path, capfd, digits):
    """MMEngine takes it for a fault of the config."""

    def interrupted(config):
        try:
            raise KeyboardInterrupt
        except BaseException:
            raise SyntaxError("Failed to format the config file")  # noqa: B904

    monkeypatch.setattr(Config, "pretty_text", property(interrupted))
    monkeypatch.chdir(tmp_path)
    assert cli.train([str(CONFIGS["mmdet"]), *options("mmdet", digits)]) == 130
    assert capfd.readouterr().err.splitlines()[-1].startswith("train: interrupted; --resume")


def test_config_without_custom_imports(refusal, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(f"_base_ = [{str(CONFIGS['mmseg'])!r}]\ncustom_imports = None\n")
    assert refusal("train", config) == (
        "the config uses ELSASwin and does not import it, add the line "
        "custom_imports = dict(imports=['elsa_mm'])"
    )


@pytest.mark.parametrize(
    "name, value, rule, got",
    [
        ("arch", "huge", "arch must be one of", "arch='huge'"),
        ("arch.window_size", 0, "window_size must be", "window_size=0"),
        ("arch.head", 1, "a dict arch knows", "got head"),
        ("out_indices", "0,4", "out_indices must be", "out_indices=(0, 4)"),
        ("drop_path_rate", 1.5, "drop_path_rate must be", "drop_path_rate=1.5"),
        ("depth", 50, "unexpected keyword", "depth"),
    ],
)
def test_wrong_backbone(refusal, digits, name, value, rule, got):
    values = {f"model__backbone__{name.replace('.', '__')}": value}
    sentence = refusal("train", CONFIGS["mmseg"], *options("mmseg", digits, **values))
    assert sentence.startswith("ELSASwin: ") and rule in sentence and got in sentence


@frameworks
def test_backbone_that_does_not_fit(refusal, digits, framework):
    values = options(framework, digits, model__backbone__arch__embed_dim=16)
    part = {"mmdet": "neck", "mmseg": "decode_head"}[framework]
    configured = Config.fromfile(CONFIGS[framework]).model[part].in_channels
    assert refusal("train", CONFIGS[framework], *values) == (
        f"model.{part}.in_channels must be the backbone's [16, 32, 64, 128], got {configured}"
    )


def empty(path):
    path.write_text("")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "part, damage, problem",
    [
        ("training", lambda path: path.unlink(), "does not exist"),
        ("validation", lambda path: path.unlink(), "does not exist"),
        ("training", empty, "is empty"),
        ("validation", cut, "is cut off or not JSON"),
    ],
)
def test_annotation_file(refusal, copy, part, damage, problem):
    path = copy / f"annotations/instances_{part}.json"
    damage(path)
    sentence = refusal("train", CONFIGS["mmdet"], *options("mmdet", copy))
    assert "annotation file" in sentence and f"{path} {problem}" in sentence


def test_annotation_file_without_images(refusal, copy):
    path = copy / "annotations/instances_validation.json"
    annotations = json.loads(path.read_text())
    path.write_text(json.dumps({**annotations, "images": [], "annotations": []}))
    sentence = refusal("train", CONFIGS["mmdet"], *options("mmdet", copy))
    assert sentence == f"the val data's annotation file {path}: has no images"


def test_folder_without_images(refusal, copy):
    shutil.rmtree(copy / "images/training")
    (copy / "images/training").mkdir()
    sentence = refusal("train", CONFIGS["mmseg"], *options("mmseg", copy))
    assert sentence.startswith(f"image folder {copy}/images/training lacks ")


@frameworks
def test_missing_image_folder(refusal, copy, framework):
    shutil.rmtree(copy / "images/training")
    sentence = refusal("train", CONFIGS[framework], *options(framework, copy))
    assert f"{copy}/images/training" in sentence and sentence.endswith("does not exist")


def test_missing_data_says_where_it_looked(refusal, tmp_path):
    sentence = refusal("train", CONFIGS["mmdet"])
    assert f"{tmp_path}/data/digits/annotations/instances_training.json does not" in sentence


@pytest.mark.parametrize("tool", ["train", "test"])
def test_work_dir_that_cannot_be_written(refusal, digits, tmp_path, tool):
    torch.save({}, "weights.pth")
    (tmp_path / "file").touch()
    arguments = ["weights.pth"] * (tool == "test") + ["--work-dir", "file/folder"]
    sentence = refusal(tool, CONFIGS["mmdet"], *arguments, *options("mmdet", digits))
    assert sentence.startswith("the work directory file/folder cannot be written: ")


@pytest.mark.parametrize("tool", ["train", "test"])
@pytest.mark.parametrize(
    "content, problem",
    [
        (None, "the checkpoint a.pth does not exist"),
        (b"PK\x03\x04cut off", "a.pth is cut off: the end of the archive is missing"),
    ],
)
def test_checkpoint(refusal, digits, tmp_path, tool, content, problem):
    if content is not None:
        (tmp_path / "a.pth").write_bytes(content)
    arguments = {"train": ["--resume", "a.pth"], "test": ["a.pth"]}[tool]
    sentence = refusal(tool, CONFIGS["mmseg"], *arguments, *options("mmseg", digits))
    assert sentence == problem


@pytest.mark.parametrize(
    "framework, arguments, more, sentence",
    [
        ("mmdet", ["--out", "a.json"], {}, "--out must name a .pkl or .pickle file, got a.json"),
        ("mmdet", ["--tta"], {}, "--tta needs tta_model in the config"),
        (
            "mmdet",
            ["--tta"],
            {"tta_model__type": "DetTTAModel", "tta_pipeline": "[]"},
            "--tta is for boxes only in MMDetection, this model predicts masks",
        ),
        (
            "mmseg",
            ["--show-dir", "a"],
            {"default_hooks__visualization": None},
            "--show and --show-dir need default_hooks.visualization in the config",
        ),
    ],
)
def test_options_of_test(refusal, digits, framework, arguments, more, sentence):
    torch.save({}, "weights.pth")
    arguments = [*arguments, *options(framework, digits, **more)]
    assert refusal("test", CONFIGS[framework], "weights.pth", *arguments) == sentence


@pytest.mark.parametrize(
    "arguments, more, sentence",
    [
        (
            ["--amp"],
            {"optim_wrapper__type": "OtherWrapper"},
            "--amp needs optim_wrapper.type OptimWrapper, got OtherWrapper",
        ),
        (
            ["--auto-scale-lr"],
            {},
            "--auto-scale-lr needs auto_scale_lr.base_batch_size in the config",
        ),
    ],
)
def test_options_of_train(refusal, digits, arguments, more, sentence):
    arguments = [*arguments, *options("mmseg", digits, **more)]
    assert refusal("train", CONFIGS["mmseg"], *arguments) == sentence


@pytest.mark.parametrize(
    "launcher, sentence",
    [
        (
            "pytorch",
            "--launcher pytorch is for processes that torchrun has started, "
            "the environment variable RANK is not set",
        ),
        ("slurm", "without a GPU --launcher must be none or pytorch, got slurm"),
    ],
)
def test_launcher_without_a_gpu(refusal, digits, monkeypatch, launcher, sentence):
    monkeypatch.setattr("elsa_mm.cpu.get_device", lambda: "cpu")
    arguments = ["--launcher", launcher, *options("mmseg", digits)]
    assert refusal("train", CONFIGS["mmseg"], *arguments) == sentence


def test_other_ranks_are_silent(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    assert cli.train(["nothing.py"]) == 2
    assert capfd.readouterr().err == ""


class Attack:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "tool, arguments, more",
    [
        ("test", ["attack.pth"], {}),
        ("train", ["--resume", "attack.pth"], {}),
        ("train", [], {"load_from": "attack.pth"}),
    ],
    ids=["test", "resume", "load_from"],
)
def test_checkpoint_that_would_run_a_program(refusal, digits, tmp_path, tool, arguments, more):
    torch.save({"state_dict": {}, "meta": Attack()}, "attack.pth")
    arguments = [*arguments, *options("mmdet", digits, **more)]
    sentence = refusal(tool, CONFIGS["mmdet"], *arguments)
    assert sentence.startswith("attack.pth is refused, because reading it would execute code")
    assert not (tmp_path / "executed").exists()


def test_painted_images_go_to_another_folder_than_the_images(tmp_path):
    class Data(list):
        get_data_info = list.__getitem__

    data = Data([{"img_path": str(tmp_path / f"images/{part}/a.jpg")} for part in ("one", "two")])
    runner = SimpleNamespace(test_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=data)))
    for name in ("images/one", "images/two", "out"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "images/two")
    for name in ("out", "images", "nowhere"):
        preflight.keep_images(runner, str(tmp_path / name))
    with pytest.raises(UsageError, match="--show-dir must be another folder than that of the imag"):
        preflight.keep_images(runner, str(tmp_path / "link"))


def test_a_file_that_a_data_set_of_another_kind_cannot_read():
    class Runner:
        cfg = Config()

        @property
        def train_loop(self):
            return json.loads("\ufeff{}")

    with pytest.raises(UsageError, match="the train data cannot be read: Unexpected UTF-8 BOM"):
        preflight.build_data(Runner(), ["train"])
