"""tools/setup_env.py, tools/build_mmcv.py, the Makefile and .ci/run; nothing here is downloaded."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


env = load("setup_env")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A little project in place of ours, whose environment is taken to work."""
    (tmp_path / "requirements.txt").write_text(
        "# [torch]\ntorch==1\nnumpy==2\n# [build]\nninja==1\n# [packages]\nsix==1\n"
        "# [detectron2]\nsal==1\n# [mmcv]\nmmcv==1\n"
    )
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

    for name in ("torch", "mmcv", "packages", "detectron2", "project", "extension", "verify"):
        monkeypatch.setattr(env.Setup, f"step_{name}", step(name))
    return ran


# Pins


def test_requirements_pin_every_package_once():
    sections = env.parse_requirements((ROOT / "requirements.txt").read_text())
    assert set(sections) == {"torch", "build", "packages", "detectron2", "mmcv"}
    names = [re.split("==", pin)[0].lower() for pins in sections.values() for pin in pins]
    assert len(names) == len(set(names))
    assert "torch==2.11.0" in sections["torch"] and "torchvision==0.26.0" in sections["torch"]
    assert "opencv-python" not in names  # it would write over the headless one


@pytest.mark.parametrize("line", ["numpy>=2", "numpy", "-r other.txt", "numpy==2.*"])
def test_requirement_without_exact_version_is_refused(line):
    with pytest.raises(env.SetupError, match=re.escape(repr(line))):
        env.parse_requirements(f"# [torch]\n{line}\n")


def test_requirement_without_heading_is_refused():
    with pytest.raises(env.SetupError, match="under a heading: 'six==1'"):
        env.parse_requirements("six==1\n# [torch]\n")


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="another environment than .venv")
def test_environment_holds_exactly_the_pins():
    from packaging.requirements import Requirement

    for pins in env.parse_requirements((ROOT / "requirements.txt").read_text()).values():
        for requirement in map(Requirement, pins):
            if requirement.marker is None or requirement.marker.evaluate():
                installed = importlib.metadata.version(requirement.name)
                assert requirement.specifier.contains(installed), (requirement, installed)


# The machine


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 13, 0), (2, 7, 18)])
def test_unsuitable_python_is_refused(version):
    found = f"3.10, 3.11 or 3.12 is needed, /bin/py is {version[0]}.{version[1]};"
    with pytest.raises(env.SetupError, match=found):
        env.check_python(version, "/bin/py")


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 12, 99)])
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


def test_stopped_command_ends_with_all_that_it_started(tmp_path):
    runner = env.Runner(tmp_path, ["mmcv"])
    threading.Timer(0.5, runner.stop.set).start()
    with pytest.raises(env.SetupError, match="was stopped"):
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
    assert steps[0] == "torch" and steps[-2:] == ["extension", "verify"]
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


def test_failure_in_one_lane_is_reported_and_stops_the_other(project, steps, monkeypatch):
    steps.failing.add("packages")
    setup = env.Setup(project / ".venv")
    command = ["sleep", "6000"]
    monkeypatch.setattr(setup, "step_mmcv", lambda: setup.runner.run("mmcv", command))
    with pytest.raises(env.SetupError, match="packages failed"):
        setup.run()
    assert {"mmcv", "packages", "detectron2"} < set(setup.pending())


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
    redone = ["torch", "mmcv", "project", "extension", "verify"]
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
        env.Setup(project / ".venv").do("torch")  # runs pip twice
    env.Setup(project / ".venv").do("torch")
    env.Setup(project / ".venv").do("torch")
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


# mmcv's wheel


def test_wheel_is_kept_apart_by_what_it_was_compiled_for(monkeypatch, tmp_path):
    mmcv = load("build_mmcv")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [mmcv.cache_folder("onedl-mmcv==1"), mmcv.cache_folder("onedl-mmcv==2")]
    monkeypatch.setattr(mmcv.torch, "__version__", "9.9")
    folders.append(mmcv.cache_folder("onedl-mmcv==1"))
    assert len(set(folders)) == 3
    assert all(folder.parent == tmp_path / "elsa-swin" for folder in folders)


def test_broken_wheel_is_not_used(tmp_path):
    mmcv = load("build_mmcv")
    broken = tmp_path / "mmcv.whl"
    broken.write_bytes(b"PK half a file")
    assert not mmcv.loads(broken)
    with mmcv.zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("mmcv/_ext.abi3.so", "not a library")
    assert not mmcv.loads(broken)


def test_grouped_sources_hold_every_file_once(tmp_path):
    mmcv = load("build_mmcv")
    names = {f"op{index}.cpp" for index in range(9)}
    for name in {*names, "pybind.cpp"}:
        (tmp_path / name).write_text(name)
    mmcv.group_sources(tmp_path)
    groups = sorted(path for path in tmp_path.glob("*.cpp") if path.name != "pybind.cpp")
    included = re.findall(r'#include "parts/(.+)"', "".join(p.read_text() for p in groups))
    assert len(groups) == mmcv.GROUPS and sorted(included) == sorted(names)
    assert all((tmp_path / "parts" / name).read_text() == name for name in names)
    assert (tmp_path / "pybind.cpp").read_text() == "pybind.cpp"


def test_placed_wheel_replaces_the_one_before(tmp_path):
    mmcv = load("build_mmcv")
    for name in ("old.whl", "new.whl"):
        (tmp_path / name).write_text(name)
        mmcv.place(tmp_path / name, tmp_path / "sub" / "wheel")
    assert [path.name for path in (tmp_path / "sub").rglob("*")] == ["wheel", "new.whl"]


# Makefile and .ci/run


def make(*arguments):
    return subprocess.run(["make", "-C", ROOT, *arguments], text=True, capture_output=True)


def test_make_without_python_says_so():
    result = make("setup", "PYTHON=")
    assert result.returncode != 0
    assert result.stderr.startswith("Python 3.10, 3.11 or 3.12 is needed and none was found")


def test_make_help_names_every_target():
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    listed = re.findall(r"^make (\S+)", make("help").stdout, re.M)
    assert set(listed) == set(targets) - {"help"}


@pytest.mark.parametrize(
    ("failing", "status"), [("", 0), ("test", 1), ("lint", 1), ("zoo", 1), ("test lint", 1)]
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
    assert log.read_text().split() == ["test", "lint", "zoo"]
