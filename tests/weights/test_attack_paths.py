"""Files that execute code when they are unpickled, in every way in which a run loads one."""

import os

import attack_files
import d2_tiny
import pytest
from conftest import load_tool
from mm_tiny import CONFIGS, options
from PIL import Image

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from elsa_core.runtime.errors import UsageError
from elsa_core.weights import read_checkpoint
from elsa_d2 import load_config
from elsa_tools import convert
from elsa_tools.export import cli as onnx_cli
from elsa_tools.predict import cli as infer

pytestmark = [
    pytest.mark.usefixtures("clean_catalog"),
    pytest.mark.filterwarnings("ignore:Duplicate name"),
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """All of the files, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, write in attack_files.EXECUTING.items():
        write(tmp_path / f"{name}.pth")
    yield [f"{name}.pth" for name in attack_files.EXECUTING]
    assert not os.path.exists(attack_files.MARK)
    # What was run is what each of them is refused for.
    for name in attack_files.EXECUTING:
        with pytest.raises(UsageError):
            read_checkpoint(f"{name}.pth")


MM = {
    "test.py FILE": lambda file: ("test", [file], []),
    "load_from": lambda file: ("train", [], [f"load_from={file}"]),
    "--resume FILE": lambda file: ("train", ["--resume", file], []),
    "--resume": lambda file: ("train", ["--resume"], []),
    "resume=True": lambda file: ("train", [], ["resume=True"]),
    "init_cfg of the backbone": lambda file: ("train", [], pretrained("model.backbone", file)),
    "init_cfg of the head": lambda file: ("train", [], pretrained("model.decode_head", file)),
    "init_cfg of the model": lambda file: ("train", [], pretrained("model", file)),
}


def pretrained(part, file):
    return [f"{part}.init_cfg.type=Pretrained", f"{part}.init_cfg.checkpoint={file}"]


@pytest.mark.slow
@pytest.mark.parametrize("way", MM)
def test_openmmlab(files, refusal, digits, tmp_path, way):
    work = tmp_path / "work"
    for number, file in enumerate(files):
        tool, flags, changes = MM[way](file)
        if "esume" in way and file not in flags:
            work.mkdir(exist_ok=True)
            os.replace(file, work / "iter_1.pth")
            (work / "last_checkpoint").write_text(str(work / "iter_1.pth"))
        arguments = options("mmseg", digits, train_cfg__max_iters=1)
        line = refusal(tool, CONFIGS["mmseg"], *flags, "--work-dir", work, *arguments, *changes)
        if "esume" in way and file not in flags:
            os.replace(work / "iter_1.pth", file)
        assert "Traceback" not in line and ".pth" in line, (number, line)
        if "init_cfg" in way and number:
            break  # each builds the model, which takes seconds


D2 = {
    "training": ("MODEL.WEIGHTS",),
    "evaluation": ("MODEL.WEIGHTS", "--eval-only"),
    "training, --resume": ("", "--resume"),
    "evaluation, --resume": ("", "--resume", "--eval-only"),
}


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["ours", "stock"])
@pytest.mark.parametrize("way", D2)
def test_detectron2(files, digits, tmp_path, capfd, way, backbone):
    tool = load_tool("train_net")
    key, *flags = D2[way]
    changes = [] if backbone == "ours" else ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    if backbone == "stock":
        changes += ["MODEL.FPN.IN_FEATURES", "['res2','res3','res4','res5']"]
        changes += ["MODEL.RESNETS.OUT_FEATURES", "['res2','res3','res4','res5']"]
    for file in files:
        for name in (file, file.replace(".pth", ".pkl")):
            os.path.exists(name) or os.link(file, name)
            output = tmp_path / "out"
            output.mkdir(exist_ok=True)
            arguments = d2_tiny.arguments_of(digits, *flags, MODEL__DEVICE="cpu")
            if key:
                arguments += [key, name]
            else:
                (output / "last_checkpoint").write_text(f"../{name}")
            assert tool.main([*arguments, *changes, "OUTPUT_DIR", str(output)]) == 2
            line = capfd.readouterr().err.strip().splitlines()[-1]
            assert line.startswith("train_net: ") and name in line


@pytest.mark.parametrize("config", [d2_tiny.CONFIG, str(CONFIGS["mmdet"])])
def test_tools(files, tmp_path, capfd, config):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a.png")
    for file in files:
        assert convert.main([file, "b.pth", "--to", "backbone"]) == 2
        assert infer.main(["images", "--config", config, "--weights", file, "--out", "o"]) == 2
        assert onnx_cli.main(["--config", config, "--weights", file, "--out", "o.onnx"]) == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert len([line for line in lines if f": {file} " in line]) == 3


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_yaml_configs_are_data(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(f"OUTPUT_DIR: {tag} [{attack_files.MARK}]\n")
    (tmp_path / "b.yaml").write_text(f'_BASE_: "{tmp_path}/a.yaml"\n')
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(UsageError, match=name):
            load_config(name)
    assert not os.path.exists(attack_files.MARK)
