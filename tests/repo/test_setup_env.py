"""tools/setup_env.py, the Makefile and .ci/run; nothing here is downloaded."""

import functools
import importlib.metadata
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import load_tool
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
env = load_tool("setup_env")
PINS = [
    Requirement(line.split(" \\")[0])
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line and line[0] not in "# "
]


# Pins


def test_requirements_are_those_that_are_named():
    """requirements.txt is made from tools/pins/pyproject.toml: `make pins` is not forgotten."""
    named = tomllib.loads((ROOT / "tools/pins/pyproject.toml").read_text())
    for requirement in map(Requirement, named["project"]["dependencies"]):
        pins = [pin for pin in PINS if pin.name == requirement.name]
        assert pins
        for pin in pins:
            ((operator, version),) = [(one.operator, one.version) for one in pin.specifier]
            assert operator == "==" and requirement.specifier.contains(version), pin
    left_out = {*named["tool"]["uv"]["exclude-dependencies"]}
    assert not left_out & {pin.name for pin in PINS}
    assert "opencv-python" in left_out  # it would write over the headless one


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_python_gets_one_version_of_every_package(python):
    old, new = ["3.10"], ["3.11", "3.12", "3.13"]
    only_some = dict.fromkeys(
        ["decorator", "exceptiongroup", "nvidia-curand", "tomli", "sal-detectron2"], old
    )
    only_some |= dict.fromkeys(["ipython-pygments-lexers", "narwhals", "nvidia-cuda-cccl"], new)
    for name in {pin.name for pin in PINS}:
        pins = [pin for pin in PINS if pin.name == name]
        suits = [p for p in pins if not p.marker or p.marker.evaluate({"python_version": python})]
        needed = name not in only_some or python in only_some[name]
        assert len(suits) == needed, (name, python)


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="another environment than .venv")
def test_environment_holds_exactly_the_pins():
    for pin in PINS:
        if pin.name == "sal-detectron2" or pin.marker is None or pin.marker.evaluate():
            assert pin.specifier.contains(importlib.metadata.version(pin.name)), pin


# The machine


def test_python_out_of_range_is_refused():
    for version in ((3, 10, 0), (3, 11, 7), (3, 13, 99)):
        env.check_python(version, "/bin/py")
    for version in ((3, 9, 18), (3, 14, 0), (2, 7, 18)):
        found = f"3.10 to 3.13 is needed, /bin/py is {version[0]}.{version[1]};"
        with pytest.raises(env.SetupError, match=found):
            env.check_python(version, "/bin/py")


def test_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(env.SetupError, match=r"no C\+\+ compiler found \(c\+\+, g.*apt install g"):
        env.check_machine()
    monkeypatch.setenv("CXX", "/opt/none/bin/c++")
    with pytest.raises(env.SetupError, match=r"found \(/opt/none/bin/c\+\+\)"):
        env.check_machine()


@pytest.mark.parametrize("name", ["g++", "clang++"])
def test_another_compiler_than_cxx_is_found(monkeypatch, tmp_path, name):
    (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    env.check_machine()


def test_missing_venv_module_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(env.SetupError, match=r"virtual environments: install python3\.\d+-venv"):
        env.check_machine()


def test_missing_python_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(env.shutil, "which", lambda name: name)
    monkeypatch.setattr(env.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(env.SetupError, match=r"Python\.h is missing.*apt install python3\.\d+-dev"):
        env.check_machine()


def test_small_disk_is_refused(monkeypatch):
    usage = namedtuple("usage", "free")(2.5e9)
    monkeypatch.setattr(env.shutil, "which", lambda name: name)
    monkeypatch.setattr(env.shutil, "disk_usage", lambda path: usage)
    header = namedtuple("header", "is_file")(lambda: True)
    monkeypatch.setattr(env, "Path", lambda *parts: header)
    with pytest.raises(env.SetupError, match=r"needs 9 GB of disk space, 2\.5 are free"):
        env.check_machine()


# The steps


PYTHON = """#!/bin/sh
# Stands in for Python: says what it is asked for, and makes the files that are looked for.
case "$*" in
    "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit;;
    "-c import pip") exit;;
    *--watch*) cat > "$3"; exit;;
    -c*) echo site-packages; exit;;
esac
echo "$*" >> log
case "$*" in *"$(cat endless 2>/dev/null || echo nothing)"*) touch begun; exec sleep 999;; esac
case "$*" in *"$(cat failing 2>/dev/null || echo nothing)"*) echo "the reason"; exit 3;; esac
case "$*" in
    *build_mmcv*)
        echo "$CXX" > compiler
        mkdir -p .venv/setup/mmcv.wheel; touch .venv/setup/mmcv.wheel/mmcv.whl;;
    *build_ext*) touch elsa_core/_C.so;;
esac
"""
STEPS = {
    "check": "tools/setup_env.py",
    "build tools": "-r .venv/setup/packages.tools",
    "packages": "-r .venv/setup/packages.in",
    "detectron2": "-r .venv/setup/detectron2.in",
    "mmcv": "tools/build_mmcv.py",
    "install mmcv": "mmcv.whl",
    "project": "-e .",
    "extension": "build_ext --inplace",
    "verify": "setup_env.py --verify",
}


class Project:
    """A little project with our Makefile, and a stand-in for Python."""

    def __init__(self, root):
        self.root = root
        shutil.copy(ROOT / "Makefile", root)
        names = ("torch", "numpy", "pip", "wheel", "sal-detectron2", "onedl-mmcv")
        pin = "{}==1 ; python_version < '3.99' \\\n    --hash=sha256:a \\\n    --hash=sha256:b\n"
        self.write("requirements.txt", "# Pins\n\n" + "".join(map(pin.format, names)))
        for name in ("setup.py", "pyproject.toml", "csrc/cpu/a.cpp", "tools/build_mmcv.py"):
            self.write(name, "first version")
        self.write("python", PYTHON)
        (root / "python").chmod(0o755)
        (root / "elsa_core").mkdir()

    def write(self, name, text):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def start(self, **options):
        command = ["make", "-C", self.root, "--no-print-directory", "setup", "PYTHON=./python"]
        return subprocess.Popen(command, **options)

    def setup(self, status=0, **options):
        """The steps that were run, and what was printed."""
        self.write("log", "")
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        process = self.start(text=True, **pipes, **options)
        said = "".join(process.communicate())
        assert (process.returncode != 0) == (status != 0), said
        self.log = (self.root / "log").read_text().splitlines()
        parts = STEPS.items()
        return [[name for name, part in parts if part in line][-1] for line in self.log], said


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_every_step_is_done_once(project):
    ran, said = project.setup()
    assert ran == list(STEPS)
    assert "Set-up, 1 of 6: packages" in said and said.endswith(".venv is ready\n")
    files = [line for line in project.log if " -r " in line]
    assert len(files) == 3 and all("--require-hashes" in line for line in files)
    inputs = {p.stem: p.read_text() for p in (project.root / ".venv/setup").glob("*.in")}
    assert re.findall("^[a-z-]*==", inputs["packages"], re.M) == [
        "torch==", "numpy==", "pip==", "wheel==",
    ]  # fmt: skip
    assert inputs["detectron2"] == (
        "sal-detectron2==1 \\\n    --hash=sha256:a \\\n    --hash=sha256:b\n"
    )
    assert project.setup() == ([], "")


def test_progress_of_pip_is_shown_and_what_it_says_is_kept(tmp_path, monkeypatch, capsys):
    said = [f"Collecting package{number}==1\n  Downloading it\n" for number in range(100)]
    said += ["Ignoring package: markers\n", "Installing collected packages: all\n"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(said)))
    assert env.main(["--watch", str(tmp_path / "log"), "--total", "101"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    steps = [f"downloading: {number} of 101 packages" for number in (50, 100)]
    assert lines == [*steps, "installing: 101 of 101 packages"]
    assert (tmp_path / "log").read_text() == "".join(said)


def test_the_end_of_what_pip_says_is_shown_after_a_failure(project):
    project.write("failing", "packages.in")
    assert "the reason" in project.setup(status=2)[1]


def test_failed_set_up_goes_on_where_it_stopped(project):
    project.write("failing", "build_ext")
    ran, said = project.setup(status=2)
    assert ran == list(STEPS)[:-1]
    assert "the reason" in said and "repeat the command: it continues from that" in said
    project.write("failing", "nothing")
    assert project.setup()[0] == ["extension", "verify"]


@pytest.mark.parametrize("step", ["packages", "mmcv"])
def test_interrupt_leaves_no_process_and_the_next_set_up_repeats_the_step(project, step):
    project.write("endless", STEPS[step])
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also with nohup and &
    process = project.start(preexec_fn=heed, start_new_session=True, stderr=subprocess.DEVNULL)
    while not (project.root / "begun").exists():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() != 0
    # Every process that set-up has started holds its lock: when it is free, all have ended.
    subprocess.run(["flock", "--wait", "100", project.root, "true"], check=True)
    project.write("endless", "nothing")
    assert step in project.setup()[0]


def test_a_compiler_of_another_name_compiles(project):
    tools = "awk bash cat cmp cp flock grep head ls make mkdir mv nproc rm sed sh tail touch"
    for name in tools.split():
        (project.root / "bin" / name).parent.mkdir(exist_ok=True)
        (project.root / "bin" / name).symlink_to(shutil.which(name))
    (project.root / "bin/clang++").symlink_to("/bin/true")
    project.setup(env={"PATH": f"{project.root}/bin"})
    assert (project.root / "compiler").read_text() == f"{project.root}/bin/clang++\n"


def test_install_after_an_interrupted_one_trusts_nothing(project):
    project.write("failing", "packages.in")
    project.setup(status=2)
    project.write("failing", "nothing")
    assert project.setup()[0][:2] == ["build tools", "packages"]
    assert all("--ignore-installed" in line for line in project.log[:2])
    assert not any("--ignore-installed" in line for line in project.log[2:])


@pytest.mark.parametrize(
    ("changed", "redone"),
    [
        ("csrc/cpu/a.cpp", ["extension"]),
        ("setup.py", ["extension"]),
        ("pyproject.toml", ["project"]),
        ("tools/build_mmcv.py", ["mmcv", "install mmcv"]),
        ("elsa_core/_C.so", ["extension"]),
        (
            "torch",
            ["build tools", "packages", "mmcv", "install mmcv", "project", "extension"],
        ),
        ("numpy", ["build tools", "packages"]),
        (".venv/bin/python", list(STEPS)[:-1]),
    ],
)
def test_change_redoes_what_depends_on_it(project, changed, redone):
    project.setup()
    path = project.root / changed
    if changed in ("torch", "numpy"):
        path = project.root / "requirements.txt"
        path.write_text(path.read_text().replace(f"{changed}==1", f"{changed}==2"))
    elif changed.startswith(("elsa_core", ".venv")):
        path.unlink()
    else:
        content = path.read_text()
        path.write_text(content)  # touched, not changed
        assert project.setup()[0] == []
        path.write_text("second version")
    assert project.setup()[0] == [*redone, "verify"]


@pytest.mark.slow
def test_second_set_up_waits_for_what_is_left_of_the_first(project):
    project.setup()
    first = subprocess.Popen(["flock", ".", "sh", "-c", "sleep 2; touch done"], cwd=project.root)
    while not subprocess.run(["flock", "-n", ".", "true"], cwd=project.root).returncode:
        pass
    assert "Waiting for another set-up" in project.setup()[1]
    assert (project.root / "done").exists()
    first.wait()


# Makefile and .ci/run


def make(*arguments):
    return subprocess.run(["make", "-C", ROOT, *arguments], text=True, capture_output=True)


def test_make_without_python_says_so():
    result = make("setup", "PYTHON=")
    assert result.returncode != 0
    assert result.stderr.startswith("Python 3.10 to 3.13 is needed and none was found")


def test_make_help_names_every_target():
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    listed = re.findall(r"^make (\S+)", make("help").stdout, re.M)
    assert set(listed) == set(targets) - {"help"}


@pytest.mark.parametrize(
    ("failing", "status"),
    [
        ("", 0),
        *((x, 1) for x in ("test", "lint", "zoo", "wheel", "test-environments", "test lint")),
    ],
)
def test_ci_run_fails_when_a_part_of_it_fails(tmp_path, failing, status):
    log = tmp_path / "log"
    fake = tmp_path / "make"
    fake.write_text(
        f'#!/bin/sh\necho "$1" >> {log}\ncase " {failing} " in *" $1 "*) exit 2;; esac\n'
    )
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = subprocess.run([ROOT / ".ci" / "run"], env={"PATH": path, "CI": "true"})
    assert result.returncode == status
    assert log.read_text().split() == ["test", "lint", "zoo", "wheel", "test-environments"]
