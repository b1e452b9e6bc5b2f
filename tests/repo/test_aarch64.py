"""The wheel for aarch64, as far as any machine can say: its compiler, flags and symbols."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = "aarch64-linux-gnu-g++"
RECORDER = """#!/bin/sh
[ "$1" = -dumpfullversion ] && echo 12.2.0
echo "$@" >> "${0%/*}/calls"
while [ $# -gt 1 ]; do [ "$1" != -o ] || : > "$2"; shift; done
"""


@pytest.fixture
def cross_environment(monkeypatch, tmp_path):
    """That of `build_wheel --platform aarch64`, with no compiler on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LDFLAGS", "-Wl,-O1")
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    return runpy.run_path(str(ROOT / "tools/build_wheel.py"))["cross_environment"]


@pytest.mark.filterwarnings("ignore:License classifiers")
def test_cross_compiler_compiles_and_links_everything(cross_environment, tmp_path, monkeypatch):
    script = tmp_path / COMPILER
    script.write_text(RECORDER)
    script.chmod(0o755)
    for name, text in cross_environment("aarch64", tmp_path).items():
        monkeypatch.setenv(name, text)
    build = ["build", "--build-base", str(tmp_path / "build"), "build_ext"]
    monkeypatch.setattr(sys, "argv", ["setup.py", "-q", *build])
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    (binary,) = tmp_path.glob("build/lib.*/elsa_core/_C.so")
    assert binary.parts[-3].startswith("lib.linux-aarch64")
    calls = (tmp_path / "calls").read_text().splitlines()
    stand_in, *compiled, linked = (line for line in calls if " -o " in line)
    sources = {Path(word).name for word in " ".join(compiled).split() if word.endswith(".cpp")}
    ours = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    assert sources == {path.name for path in ours}
    assert not re.search(" -m|USE_CUDA", " ".join(compiled))  # nothing of another machine
    assert "-soname,libtorch.so" in stand_in and f"-L{tmp_path} -Wl,-O1 " in linked


def test_what_cannot_be_cross_compiled_is_said_in_one_sentence(
    cross_environment, tmp_path, monkeypatch
):
    with pytest.raises(SystemExit, match=r"needs aarch64-linux-gnu-g\+\+, .*'apt-get install g"):
        cross_environment("aarch64", tmp_path)
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="FORCE_CUDA=1 asks for those for CUDA"):
        cross_environment("aarch64", tmp_path)


def preprocessed(path, machine):
    """What the compiler for that machine sees of a file, with `#include` left as a word."""
    target = ["-U__x86_64__", "-U__aarch64__", f"-D__{machine}__", "-D__GLIBC__"]
    command = ["c++", "-E", "-P", *target, "-xc++", "-"]
    text = re.sub("^#include", "included", path.read_text(), flags=re.MULTILINE)
    return subprocess.check_output(command, input=text, text=True)


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("machine, oldest", [("x86_64", "2.2.5"), ("aarch64", "2.17")])
def test_sources_follow_the_target_and_not_this_machine(machine, oldest):
    """Its instruction sets, and functions of the first glibc that it had."""
    wanted = re.findall(r"(\w+)@GLIBC_([\d.]+)", preprocessed(ROOT / "csrc/glibc.h", machine))
    assert wanted == [("exp", oldest), ("dlsym", oldest)]
    for name in ("portable", "avx2", "avx512"):
        text = preprocessed(ROOT / f"csrc/cpu/attention_rows_{name}.cpp", machine)
        there = name == "portable" or machine == "x86_64"
        assert ("attention_rows_impl.h" in text) == there
