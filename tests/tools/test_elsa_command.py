"""The command `elsa`: what it lists, which command it hands over to, and what it refuses."""

import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from elsa_tools.__main__ import COMMANDS, main

# A refusal of each command's own, which therefore has been reached.
REFUSED = {
    "doctor": (["--all"], "elsa doctor: error: unrecognized arguments: --all"),
    "convert": (["no.pth", "x.pth", "--to", "backbone"], "elsa convert: no.pth cannot be read"),
    "demo": (
        ["x.jpg", "--config", "c", "--weights", "w", "--out", "o", "--score-threshold", "2"],
        "elsa demo: --score-threshold must be in [0, 1], got 2.0",
    ),
    "data": (["check", "coco", "--sample", "x"], "elsa data: --sample must be a number"),
    "export": (
        ["--arch", "tiny", "--out", "x"],
        "elsa export: --out must end in .onnx, .pt2, .xml, got x",
    ),
    "analyze": (["parts"], "elsa analyze: either CONFIG or --arch is needed, got neither"),
    "fit": (["no/such"], "elsa fit: no/such does not exist"),
}


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name:9}{command.summary}\n" in out
    assert list(COMMANDS) == list(REFUSED)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_speaks_for_itself(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: elsa {name} ")
    arguments, sentence = REFUSED[name]
    try:
        status = main([name, *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2 and sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["train"], ["train", "--help"], ["Doctor"]])
def test_an_unknown_command_is_one_sentence(arguments, capsys):
    assert main(arguments) == 2
    name = arguments[0]
    known = "doctor, convert, demo, data, export, analyze, fit"
    assert capsys.readouterr().err == f"elsa: {name!r} is none of the commands {known}\n"


WITHOUT_TORCH = """
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Hide())
"""
OLD_TORCH = (
    'sys.modules["torch"] = type(sys)("torch"); sys.modules["torch"].__version__ = "2.5.1"\n'
)


@pytest.mark.parametrize("setting", [WITHOUT_TORCH, OLD_TORCH], ids=["no PyTorch", "PyTorch 2.5"])
@pytest.mark.parametrize("arguments", [["doctor"], ["demo", "--help"], ["--version"]])
def test_what_pytorch_lacks_is_one_sentence(setting, arguments):
    program = f"import sys\n{setting}from elsa_tools.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"elsa: .*PyTorch 2\.6 or later.*\n", done.stderr), done.stderr


@pytest.mark.slow
def test_the_installed_command_and_what_it_imports():
    """A command's module, and no framework before that asks for it."""
    scripts = '[project.scripts]\nelsa = "elsa_tools.__main__:main"\n\n'
    assert scripts in (REPOSITORY / "pyproject.toml").read_text() and callable(main)
    program = (
        "import sys; from elsa_tools.__main__ import main\n"
        "status = main(['convert', 'a', 'b', '--to', 'backbone'])\n"
        "ours = {n.partition('.')[0] for n in sys.modules if n.startswith('elsa_')}\n"
        "assert status == 2 and ours == {'elsa_core', 'elsa_tools'}, ours\n"
        "assert not {'detectron2', 'mmengine'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
