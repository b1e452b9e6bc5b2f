"""tools/test_environments.py: the table, the comparison of `pip freeze`, what is left out and what
fails, with commands of an instant in place of the environments' own."""

import json
import os
import re
import sys
from dataclasses import replace

import pytest
from conftest import load_tool
from docs_blocks import REPOSITORY, commands, read_blocks

tool = load_tool("test_environments")
ENVIRONMENTS, NEWEST = tool.ENVIRONMENTS, tool.NEWEST
Environment, Step = tool.Environment, tool.Step

HERE = "{}.{}".format(*sys.version_info)
BEFORE = "numpy==1.26.4\npip==24.0\ntorch==2.6.0\n"


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Runs the tool with environments of the test's own; (status, rows, what it printed)."""
    monkeypatch.delenv("DETECTRON2", raising=False)
    monkeypatch.setattr(tool, "copy_tree", lambda target: None)
    monkeypatch.setattr(tool, "make_images", lambda folder: None)
    monkeypatch.setattr(tool, "find_pythons", lambda named=(): {HERE: sys.executable})

    def run(*environments, arguments=()):
        monkeypatch.setattr(tool, "ENVIRONMENTS", environments)
        status = tool.main(["--out", str(tmp_path / "out"), *arguments])
        file = tmp_path / "out/environments.json"
        rows = json.loads(file.read_text()) if file.is_file() else []
        return status, rows, capsys.readouterr().out

    return run


@pytest.fixture
def quick(monkeypatch):
    """Environments are this Python; `pip freeze` is the file `frozen` in the copy of the tree."""

    def make(self):
        (self.venv / "bin").mkdir(parents=True)
        self.tree.mkdir()
        (self.tree / "frozen").write_text(BEFORE)
        python = self.venv / "bin/python"
        python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exec cat {self.tree}/frozen\nexit 1\n')
        python.chmod(0o755)
        self.row.python = HERE

    monkeypatch.setattr(tool.Machine, "make", make)


def environment(*steps, name="mine", **more):
    return Environment(name, HERE, ("torch==2.6.0",), steps=steps, **more)


def test_a_passing_environment(table, quick, tmp_path):
    wheel = "mmcv @ file:///x/mmcv-2.1.0-cp311-cp311-linux_x86_64.whl#sha256=0a"
    ours = Step(
        "install", "echo 'elsa-swin @ file:///x' >>frozen; echo all the output", counted=True
    )
    before = Step("compiled", f"echo '{wheel}' >>frozen; echo 'detectron2 @ file:///y' >>frozen")
    status, (row,), printed = table(
        environment(ours, Step("look", "true"), prepare=(before,), limit=60)
    )
    assert status == 0 and row["frameworks"] == "mmcv 2.1.0, detectron2"
    assert row["ran"] == ["compiled", "install", "look"]
    assert row["added"] == ["elsa-swin @ file:///x"]
    assert re.search(
        r"\| mine \| .*2\.6\.0.*install, look \| passed, detections after 0 s", printed
    )
    assert "all the output" in (tmp_path / "out/logs/mine.log").read_text()
    assert (tmp_path / "out/environments.md").read_text() in printed
    assert not (tmp_path / "out/work").exists()


@pytest.mark.parametrize(
    "step, reason",
    [
        (Step("bad", "echo why; exit 3"), "bad: exit status 3"),
        (Step("bad", "false | true"), "bad: exit status 1"),
        (Step("bad", "true", refused=True), "a refusal was expected"),
        (Step("bad", "echo other words; exit 1", refused=True, says="2.6"), "does not say '2.6'"),
        (Step("bad", "true", says="passed"), "does not say 'passed'"),
        (Step("bad", "echo 'dns error'; exit 2"), "the package registry cannot be reached"),
        (Step("bad", "sed -i s/2.6.0/2.15.0/ frozen"), "torch==2.6.0 -> torch==2.15.0"),
        (Step("bad", "sed -i /numpy/d frozen"), "numpy==1.26.4 -> gone"),
        (Step("bad", "sleep 0.2", counted=True), "to the first detections"),
        (Step("bad", block=("README.md", "not in it")), "README.md has 0 blocks"),
    ],
    ids=lambda value: None,
)
def test_a_failing_step(table, quick, step, reason):
    """It ends its environment, the others are made, and the status is 1."""
    status, rows, printed = table(environment(step, limit=0.1), environment(name="other"))
    assert status == 1
    assert [row["result"].partition(":")[0] for row in rows] == ["failed", "passed"]
    assert reason in rows[0]["result"] and rows[0]["result"] in printed


def test_nothing_is_run_after_a_failure(table, quick):
    status, (row,), _ = table(environment(Step("a", "exit 1"), Step("b", "true")))
    assert status == 1 and row["ran"] == []


@pytest.mark.parametrize(
    "spec, reason",
    [
        (replace(environment(), python="3.99"), "there is no Python 3.99: name one with --python"),
        (environment(needs=("DETECTRON2",)), "DETECTRON2 names no checkout"),
        (environment(needs=("wheel",)), "there is no wheel in dist/"),
    ],
    ids=lambda value: None,
)
def test_what_is_missing_is_left_out_with_its_reason(
    table, quick, tmp_path, monkeypatch, spec, reason
):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    status, (row,), printed = table(spec)
    assert status == 0 and row["result"].startswith("left out: " + reason)
    assert f"| {row['result']} |" in printed
    monkeypatch.setattr(tool, "ENVIRONMENTS", [spec])
    assert table(spec, arguments=["--only", "mine"])[0] == 1  # it was asked for by name
    assert f"left out: {reason}" in table(spec, arguments=["--list"])[2]


@pytest.mark.parametrize(
    "arguments, checkout, sentence",
    [
        (["--wheel", "no.whl"], "", "no.whl is no file"),
        ([], "no", "no checkout of Detectron2"),
    ],
)
def test_what_is_named_and_not_there(monkeypatch, capsys, arguments, checkout, sentence):
    monkeypatch.setenv("DETECTRON2", checkout)
    with pytest.raises(SystemExit) as end:
        tool.main(["--list", *arguments])
    assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_interpreters(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(tool, "PYTHONS", (HERE,))
    assert tool.find_pythons([sys.executable]) == {HERE: sys.executable}
    monkeypatch.delenv("DETECTRON2", raising=False)
    assert tool.main(["--list", "--python", "/bin/true"]) == 2
    assert f"--python /bin/true is no Python of {HERE}" in capsys.readouterr().err


def test_comparison_of_pip_freeze():
    after = "Numpy==2.2.0\npip==24.0\nelsa-swin @ file:///x\nsix==1.17.0\n"
    lost, added = tool.changes(BEFORE, after)
    assert lost == ["numpy==1.26.4 -> Numpy==2.2.0", "torch==2.6.0 -> gone"]
    assert added == ["elsa-swin @ file:///x", "six==1.17.0"]
    assert tool.changes(BEFORE, BEFORE) == ([], [])


def test_no_compiler_on_the_path(tmp_path, monkeypatch):
    path = tmp_path / "usr"
    path.mkdir()
    for name in "ls gcc g++-12 x86_64-linux-gnu-gcc-12 c++ nvcc cc python3 clang".split():
        (path / name).touch()
    monkeypatch.setenv("PATH", f"{path}:{tmp_path / 'missing'}")
    tool.without_compilers(tmp_path / "bin")
    assert os.listdir(tmp_path / "bin") == ["ls"]


def test_users_commands_are_those_of_the_guides():
    """Steps may add options to them, and replace our tools by the frameworks' own."""
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    known = {
        " ".join(c.partition("  #")[0].split())
        for page in pages
        for b in read_blocks(page.read_text())
        if b.language == "sh"
        for c in commands(b.code)
    }
    steps = {step for spec in ENVIRONMENTS for step in (*spec.prepare, *spec.steps)}
    for step in steps:
        if step.block:
            assert tool.code_of(*step.block)
        for command in re.split(" && ", step.run):
            if re.match(r"python (-m elsa|tools|\$SITE)|pip install --no-build.* '?\.", command):
                own = re.sub(r"\$SITE/mm\w+/\.mim/", "", command)
                own = own.replace("$DETECTRON2", "detectron2")
                own = re.sub(r"onedl-mmcv==\S+", "mmcv==2.1.0", own)
                own = own.replace("--resume SOLVER.MAX_ITER 6", "--resume SOLVER.MAX_ITER 700")
                if "tools/test.py" in own:  # the number of the last checkpoint is another
                    own = own.partition(" work_dirs")[0]
                    assert any(c.startswith(own + " ") for c in known), command
                    continue
                assert any(own == c or own.startswith(c + " ") for c in known), command


def test_what_the_table_of_environments_covers():
    names = [spec.name for spec in ENVIRONMENTS]
    assert len(names) == len(set(names))
    assert {spec.python for spec in ENVIRONMENTS} >= {"3.10", "3.12", NEWEST}
    wheels = [spec for spec in ENVIRONMENTS if "wheel" in spec.needs]
    assert len({spec.torch for spec in wheels}) >= 3 and len({spec.python for spec in wheels}) >= 3
    assert all(not spec.compiler and spec.limit == 60 for spec in wheels)
    _, _, named = (REPOSITORY / ".ci/run").read_text().partition("test-environments ENV_ARGS=")
    named = set(re.findall(r"[a-z]+-[a-z]+", named)) & set(names)
    assert named == {"core-oldest", "core-newest", "wheel-newest"}
