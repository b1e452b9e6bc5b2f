"""tools/setup_env.py, the Makefile and .ci/run; nothing here is downloaded."""

import importlib.metadata
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
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


def pin(requirement, hashes=2):
    """The lines of a requirement, as in requirements.txt."""
    lines = [requirement, *(f"--hash=sha256:{index:064x}" for index in range(hashes))]
    return " \\\n    ".join(lines) + "\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A little project in place of ours, whose environment is taken to work."""
    names = ("torch", "numpy", *env.BUILD_TOOLS, env.DETECTRON2, env.MMCV)
    (tmp_path / "requirements.txt").write_text("".join(pin(f"{name}==1") for name in names))
    for name in ("setup.py", "pyproject.toml", "csrc/elsa.cpp", "tools/build_mmcv.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("first version")
    (tmp_path / "elsa_core").mkdir()
    (tmp_path / "elsa_core" / "_C.so").touch()
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(env, "ROOT", tmp_path)
    monkeypatch.setattr(env, "check_machine", lambda free_gb: None)
    monkeypatch.setattr(env.Setup, "venv_works", lambda self: True)
    return tmp_path


@pytest.fixture
def steps(monkeypatch):
    """Names of the steps that were run; a name put into `.failing` fails."""
    ran = type("Steps", (list,), {"failing": set()})()

    def step(name):
        def run(self):
            ran.append(name)
            if name in ran.failing:
                raise env.SetupError(f"{name} failed")

        return run

    for name in ("packages", "detectron2", "mmcv", "project", "extension", "verify"):
        monkeypatch.setattr(env.Setup, f"step_{name}", step(name))
    return ran


# Pins


PINS = env.parse_requirements((ROOT / "requirements.txt").read_text())


def test_requirements_are_those_that_are_named():
    """requirements.txt is made from tools/pins/pyproject.toml: `make pins` is not forgotten."""
    named = tomllib.loads((ROOT / "tools/pins/pyproject.toml").read_text())
    for requirement in map(Requirement, named["project"]["dependencies"]):
        for line in PINS[requirement.name]:
            version = re.match(r"[\w.-]+==(\S+)", line)[1]
            assert requirement.specifier.contains(version), line
    assert not set(named["tool"]["uv"]["exclude-dependencies"]) & set(PINS)
    assert "opencv-python" not in PINS  # it would write over the headless one


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_python_gets_one_version_of_every_package(python):
    old, new = ["3.10"], ["3.11", "3.12", "3.13"]
    only_some = dict.fromkeys(["exceptiongroup", "nvidia-curand", "tomli", env.DETECTRON2], old)
    only_some |= dict.fromkeys(["narwhals", "nvidia-cuda-cccl"], new)
    for name, lines in PINS.items():
        pins = [Requirement(line.split(" --hash")[0]) for line in lines]
        suits = [p for p in pins if not p.marker or p.marker.evaluate({"python_version": python})]
        needed = name not in only_some or python in only_some[name]
        assert len(suits) == needed, (name, python)


@pytest.mark.parametrize(
    "entry", ["numpy>=2", "numpy==2.*", "numpy==2", "-r other.txt", "numpy @ file:///tmp/numpy"]
)
def test_requirement_without_exact_version_and_hash_is_refused(entry):
    text = entry if entry == "numpy==2" else pin(entry).replace(" \\\n   ", "")
    with pytest.raises(env.SetupError, match=re.escape(repr(text.strip()))):
        env.parse_requirements(f"# comment\n{text}\n")


def test_changed_package_is_not_installed(tmp_path):
    """What has another hash than requirements.txt stays out, and the advice is the right one."""
    with zipfile.ZipFile(tmp_path / "six-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("six.py", "")
        wheel.writestr("six-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: six\nVersion: 1\n")
        wheel.writestr("six-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("six-1.dist-info/RECORD", "")
    setup = env.Setup(tmp_path)
    setup.state.mkdir()
    setup.python = sys.executable
    options = ["--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / "target")]
    with pytest.raises(env.SetupError, match=r"requirements\.txt has another hash"):
        setup.install_pins("packages", [pin("six==1").replace("\\\n", "")], *options)
    assert not (tmp_path / "target").exists()


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="another environment than .venv")
def test_environment_holds_exactly_the_pins():
    for requirement in (
        Requirement(pin.split(" --hash")[0]) for pins in PINS.values() for pin in pins
    ):
        if requirement.name == env.DETECTRON2:
            requirement.marker = None
        if requirement.marker is None or requirement.marker.evaluate():
            installed = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(installed), (requirement, installed)


# The machine


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0), (2, 7, 18)])
def test_unsuitable_python_is_refused(version):
    found = f"3.10 to 3.13 is needed, /bin/py is {version[0]}.{version[1]};"
    with pytest.raises(env.SetupError, match=found):
        env.check_python(version, "/bin/py")


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 13, 99)])
def test_suitable_python_is_accepted(version):
    env.check_python(version, "/bin/py")


def test_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(env.SetupError, match=r"no C\+\+ compiler found \(c\+\+, g.*apt install g"):
        env.check_machine(0)
    monkeypatch.setenv("CXX", "/opt/none/bin/c++")
    with pytest.raises(env.SetupError, match=r"found \(/opt/none/bin/c\+\+\)"):
        env.check_machine(0)


def test_compiler_other_than_the_default_is_found(monkeypatch, tmp_path):
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert env.find_compiler() == "g++"
    monkeypatch.setenv("CXX", "g++ -m64")
    assert env.find_compiler() == "g++ -m64"


def test_missing_venv_module_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(env.SetupError, match=r"virtual environments: install python3\.\d+-venv"):
        env.check_machine(0)


def test_missing_python_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(env, "find_compiler", lambda: "c++")
    monkeypatch.setattr(env.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(env.SetupError, match=r"Python\.h is missing.*apt install python3\.\d+-dev"):
        env.check_machine(0)


def test_small_disk_is_refused(monkeypatch):
    usage = namedtuple("usage", "free")(2.5e9)
    monkeypatch.setattr(env, "find_compiler", lambda: "c++")
    monkeypatch.setattr(env.shutil, "disk_usage", lambda path: usage)
    header = namedtuple("header", "is_file")(lambda: True)
    monkeypatch.setattr(env, "Path", lambda *parts: header)
    with pytest.raises(env.SetupError, match=r"needs 9 GB of disk space, 2\.5 are free"):
        env.check_machine(9)
    env.check_machine(2)


# Commands and their progress


def test_failure_shows_end_of_log_and_advice(tmp_path):
    code = (
        "print('a useful line'); print(\"Location 'x' is ignored: neither a file nor a directory\")"
        "; raise SystemExit(3)"
    )
    with pytest.raises(env.SetupError) as caught:
        env.Runner(tmp_path, ["torch"]).run("torch", [sys.executable, "-c", code])
    text = str(caught.value)
    assert "step 'torch' ended with status 3" in text
    assert "    a useful line" in text and "is ignored" not in text
    assert str(tmp_path / "torch.log") in text and "run the same command again" in text


def test_network_failure_is_recognised(tmp_path):
    code = "print('ERROR: No matching distribution found for torch'); raise SystemExit(1)"
    with pytest.raises(env.SetupError, match="check that pip can reach its package index"):
        env.Runner(tmp_path, ["torch"]).run("torch", [sys.executable, "-c", code])


def test_progress_is_printed_while_a_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(env, "SECONDS_PER_REPORT", 0.2)
    code = "import time; print('[12/78] c++', flush=True); time.sleep(1)"
    runner = env.Runner(tmp_path, ["torch", "mmcv"])
    runner.run("mmcv", [sys.executable, "-c", code], env.ninja_progress)
    assert re.search(r"^\[2/2\] \d+:\d\d mmcv: file 12/78$", capsys.readouterr().out, re.M)
    runner.run("mmcv", [sys.executable, "-c", "import time; time.sleep(1)"], env.ninja_progress)
    lines = (
        capsys.readouterr().out.splitlines()
    )  # the command before is none of this one's business
    assert lines and all(line.endswith("mmcv: preparing") for line in lines)


def test_interrupted_command_ends_with_all_that_it_started(tmp_path, monkeypatch):
    def interrupted(step, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "SECONDS_PER_REPORT", 0.5)
    runner = env.Runner(tmp_path, ["mmcv"])
    monkeypatch.setattr(runner, "say", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run("mmcv", ["sh", "-c", "sleep 6000 & echo $!; wait"])
    child = (tmp_path / "mmcv.log").read_text().split()[-1]
    for _ in range(6000):
        if not Path("/proc", child).exists() or "Z" in Path("/proc", child, "stat").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} still runs")


def test_pip_progress():
    collecting = "Collecting six==1\nCollecting yacs==2 (from -r x)\nCollecting six==1\n"
    assert env.pip_progress(collecting, 9) == "2/9 packages"
    fetching = collecting + "  Downloading torch-2.11.0-cp311-none-linux.whl (820.1 MB)\n"
    assert env.pip_progress(fetching, 0) == "fetching torch (820.1 MB)"
    assert env.pip_progress(fetching + "Installing collected packages: six", 9) == "unpacking"


# The steps


def test_complete_environment_has_nothing_to_do(project, steps, capsys):
    env.Setup(project / ".venv").run()
    assert sorted(steps) == sorted(env.Setup(project / ".venv").keys)
    assert steps[0] == "packages" and steps[-2:] == ["extension", "verify"]
    steps.clear()
    capsys.readouterr()
    env.Setup(project / ".venv").run()
    assert steps == [] and capsys.readouterr().out == ""


def test_failed_set_up_goes_on_where_it_stopped(project, steps):
    steps.failing.add("extension")
    with pytest.raises(env.SetupError, match="extension failed"):
        env.Setup(project / ".venv").run()
    steps.clear()
    steps.failing.clear()
    env.Setup(project / ".venv").run()
    assert steps == ["extension", "verify"]


@pytest.mark.parametrize(
    ("changed", "redone"),
    [
        ("csrc/elsa.cpp", ["extension", "verify"]),
        ("setup.py", ["extension", "verify"]),
        ("pyproject.toml", ["project", "verify"]),
        ("tools/build_mmcv.py", ["mmcv", "verify"]),
    ],
)
def test_change_of_a_file_redoes_what_depends_on_it(project, steps, changed, redone):
    env.Setup(project / ".venv").run()
    (project / changed).write_text("second version")
    assert env.Setup(project / ".venv").pending() == redone


def test_removed_extension_is_built_again(project, steps):
    env.Setup(project / ".venv").run()
    (project / "elsa_core" / "_C.so").unlink()
    assert env.Setup(project / ".venv").pending() == ["extension"]


def test_change_of_torch_redoes_what_is_compiled(project, steps):
    env.Setup(project / ".venv").run()
    requirements = project / "requirements.txt"
    requirements.write_text(requirements.read_text().replace("torch==1", "torch==2"))
    redone = ["packages", "mmcv", "project", "extension", "verify"]
    assert env.Setup(project / ".venv").pending() == redone


def test_install_after_an_interrupted_one_trusts_nothing(project, monkeypatch):
    commands = []

    def run(self, step, command, *rest):
        commands.append(command)
        if len(commands) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(env.Runner, "run", run)
    (project / ".venv" / "setup").mkdir()
    with pytest.raises(KeyboardInterrupt):
        env.Setup(project / ".venv").do("packages")  # runs pip twice
    env.Setup(project / ".venv").do("packages")
    env.Setup(project / ".venv").do("packages")
    ignoring = ["--ignore-installed" in command for command in commands]
    assert ignoring == [False, False, True, True, False, False]


def test_second_set_up_waits_for_the_first(tmp_path, capsys):
    first = env.lock(tmp_path)
    second = threading.Thread(target=lambda: os.close(env.lock(tmp_path)))
    second.start()
    second.join(0.5)
    assert second.is_alive()
    os.close(first)
    second.join(600)
    assert not second.is_alive()
    assert "Waiting for another set-up" in capsys.readouterr().out


def test_command_left_by_a_killed_set_up_is_waited_for(tmp_path):
    handle = env.lock(tmp_path)
    command = ["sh", "-c", f"sleep 1; touch {tmp_path}/done"]
    sleeper = subprocess.Popen(command, close_fds=False)
    os.close(handle)
    os.close(env.lock(tmp_path))
    assert (tmp_path / "done").exists()
    sleeper.wait()


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
