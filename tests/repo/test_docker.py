"""The Dockerfile, as far as it can be held to without a Docker daemon.

Its steps run in folders that have what it copies, with stand-ins for what installs gigabytes.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_tool

from elsa_core._range import PYTHON

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker/Dockerfile"
SETUP = load_tool("setup_env")
PAGE = (ROOT / "docs/docker.md").read_text()


def instructions():
    """(word, rest) of each instruction, on one line and without comments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line]


def stages():
    """{name: instructions}; that of the result is ""."""
    found = {}
    for word, rest in instructions():
        if word == "FROM":
            name = rest.partition(" AS ")[2]
            found[name] = []
        elif found:
            found[name].append((word, rest))
    return found


def copies(stage):
    """The sources and the target of each COPY from the project."""
    return [
        (words[:-1], words[-1])
        for word, rest in stages()[stage]
        if word == "COPY" and not (words := rest.split())[0].startswith("--")
    ]


def runs(stage):
    return [rest for word, rest in stages()[stage] if word == "RUN"]


def is_ignored(path):
    """By Dockerfile.dockerignore, whose last matching line counts."""
    ignored = False
    for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").lstrip("/")
        if (
            line
            and line[0] != "#"
            and any(fnmatch.fnmatch(str(one), pattern) for one in (path, *path.parents))
        ):
            ignored = line[0] != "!"
    return ignored


def fill(folder, *names):
    """Copies what the stages copy."""
    for name in names:
        for sources, target in copies(name):
            for source in sources:
                place = folder / target
                if (ROOT / source).is_dir():
                    caches = shutil.ignore_patterns("__pycache__", "*.so")
                    shutil.copytree(ROOT / source, place, ignore=caches, dirs_exist_ok=True)
                else:
                    (place if target.endswith("/") else place.parent).mkdir(exist_ok=True)
                    shutil.copy(ROOT / source, place)
    return folder


def bash(command, folder, **variables):
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def stand_in(folder, name):
    """A command that writes down how it is called; returns a PATH with it."""
    folder.mkdir()
    script = folder / name
    script.write_text(f'#!/bin/sh\necho {name} "$@"\n')
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_what_is_copied_is_there():
    for stage in ("environment", "wheel"):
        assert copies(stage)
        for sources, _ in copies(stage):
            for source in sources:
                assert (ROOT / source).exists() and not is_ignored(Path(source)), source
    assert is_ignored(Path(".git/config")) and is_ignored(Path("elsa_core/_C.abi3.so"))
    assert is_ignored(Path("data/digits/meta.json")) and not is_ignored(Path("csrc/cpu/softmax.h"))


def test_python_of_the_base_is_in_the_range():
    (default,) = re.findall(r"^ARG BASE=python:(\d+)\.(\d+)-", DOCKERFILE.read_text(), re.MULTILINE)
    version = tuple(map(int, default))
    assert max(SETUP.OLDEST, PYTHON[0]) <= version <= min(SETUP.NEWEST, PYTHON[1])
    for text in (DOCKERFILE.read_text(), PAGE):
        assert "Python {}.{} to {}.{}".format(*SETUP.OLDEST, *SETUP.NEWEST) in " ".join(
            text.split()
        )


def test_every_argument_is_in_the_guide():
    names = {rest.partition("=")[0] for word, rest in instructions() if word == "ARG"}
    assert names == {"BASE", "RUNTIME_BASE", "FRAMEWORK"}
    assert all(f"| `{name}` |" in PAGE for name in names)


def test_the_result_is_no_root_user_and_runs_elsa():
    result = dict(stages()[""])
    assert result["USER"].isdigit() and int(result["USER"]) > 0
    assert f"--uid {result['USER']} " in result["RUN"] and result["ENTRYPOINT"] == '["elsa"]'


@pytest.mark.parametrize("stage", ["environment", "wheel", ""])
def test_commands_are_valid_shell(stage):
    for command in runs(stage):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "framework, targets",
    [
        ("both", [".venv/setup/mmcv"]),
        ("detectron2", [".venv/setup/detectron2"]),
        ("openmmlab", ["-o", ".venv/setup/detectron2", ".venv/setup/mmcv"]),
        ("mmdet", None),
    ],
)
def test_frameworks(tmp_path, framework, targets):
    """The Makefile knows the targets, with the files that the stage has."""
    folder = fill(tmp_path / "stage", "environment")
    (folder / ".venv/bin").mkdir(parents=True)
    stand_in(tmp_path / "python", "python")
    shutil.copy(tmp_path / "python/python", folder / ".venv/bin/python")
    path = stand_in(tmp_path / "make", "make")
    done = bash(runs("environment")[-1], folder, FRAMEWORK=framework, PATH=path)
    if targets is None:
        assert done.returncode == 1 and "must be both, detectron2 or openmmlab, got" in done.stderr
        return
    make, *rest = done.stdout.splitlines()
    assert done.returncode == 0 and make.split()[1:] == targets
    removed = set(rest[0].split()) if rest else set()
    others = set(re.findall(r"^(onedl-\w+)==", (ROOT / "requirements.txt").read_text(), re.M))
    assert removed >= others - {"onedl-mmcv"} if framework == "detectron2" else not rest
    steps = bash(f"make -n {' '.join(targets)}", folder)
    assert steps.returncode == 0, steps.stderr
    assert ("sal-detectron2" in steps.stdout) == (framework != "openmmlab")
    assert ("tools/build_mmcv.py" in steps.stdout) == (framework != "detectron2")


@pytest.mark.slow
def test_the_wheel_is_built_from_what_is_copied(tmp_path):
    """Without the operator; what would be installed is written down instead."""
    folder = fill(tmp_path / "stage", "environment", "wheel")
    path = stand_in(tmp_path / "bin", "python")
    (tmp_path / "bin/python").write_text(
        '#!/bin/sh\necho FORCE_CUDA "$FORCE_CUDA"\n'
        f'case "$4" in install) echo "$@";; *) exec {sys.executable} "$@";; esac\n'
    )
    done = bash(runs("wheel")[0], folder, PATH=path, ELSA_BUILD_EXTENSION="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "wheels").glob("elsa_swin-*.whl")
    assert f"--no-compile wheels/{wheel.name}" in done.stdout
    listed = subprocess.check_output([sys.executable, "-m", "zipfile", "-l", wheel], text=True)
    for name in (
        "elsa_tools/__main__.py",
        "elsa_d2/tools/train_net.py",
        "elsa_mm/.mim/model-index",
    ):
        assert name in listed


@pytest.mark.parametrize("nvcc", [False, True])
def test_cuda_kernels_are_compiled_where_nvcc_is(tmp_path, nvcc):
    path = stand_in(tmp_path / "bin", "python")
    (tmp_path / "bin/python").write_text('#!/bin/sh\necho "cuda $FORCE_CUDA"\n')
    if nvcc:
        stand_in(tmp_path / "cuda", "nvcc")
    path = os.pathsep.join([path.split(os.pathsep)[0], *[str(tmp_path / "cuda")] * nvcc, "/bin"])
    done = bash(runs("wheel")[0], tmp_path, PATH=path, FORCE_CUDA="")
    assert done.stdout.splitlines()[0] == ("cuda 1" if nvcc else "cuda ")
