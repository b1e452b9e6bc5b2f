"""Make .venv ready for work: the pinned stack, a compiled mmcv, our extension, a smoke test.

Run by `make`; safe to run at any time, since only what is missing or out of date is done. What is
fetched is installed only if its hash stands in requirements.txt.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 10), (3, 13)
DISK_GB = 9
# Not installed like the others: a wheel tagged for Python 3.10 alone, and one to be compiled.
DETECTRON2, MMCV = "sal-detectron2", "onedl-mmcv"
BUILD_TOOLS = ("ninja", "packaging", "pip", "setuptools", "wheel")
PIN = re.compile(r"([\w.-]+)==[\w.]+( ; python_version [<=>]+ '[\d.*]+')?( --hash=sha256:\w{64})+")
SECONDS_PER_REPORT = 10
# Said by pip of configured package locations that hold nothing: never the reason of a failure.
PIP_NOISE = "neither a file nor a directory"

VERIFY = """
import warnings
warnings.filterwarnings("error", category=RuntimeWarning, message="elsa_core")
import torch, torchvision
import elsa_core
from detectron2 import model_zoo
from detectron2.modeling.meta_arch import GeneralizedRCNN
from mmcv.ops import nms
from mmdet.datasets import CocoDataset
from mmdet.models import MaskRCNN
from mmpretrain.models import ImageClassifier
from mmseg.models import EncoderDecoder

model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9], [6.0, 6.0, 9.0, 9.0]])
scores = torch.tensor([0.9, 0.8, 0.7])
kept = nms(boxes, scores, 0.5)[1].tolist(), torchvision.ops.nms(boxes, scores, 0.5).tolist()
assert kept == ([0, 2], [0, 2]), f"NMS of mmcv and torchvision kept {kept}, not boxes 0 and 2"
"""


class SetupError(Exception):
    """A failure with its explanation: what is wrong and what to do."""


def parse_requirements(text: str) -> dict[str, list[str]]:
    """Package -> its lines of requirements.txt: a version each, for which Pythons, and hashes."""
    pins: dict[str, list[str]] = {}
    for line in re.sub(r" *\\\n *", " ", text).splitlines():
        if line.strip() and not line.startswith("#"):
            if not (found := PIN.fullmatch(line)):
                raise SetupError(f"requirements.txt: not `name==version` with hashes: {line!r}")
            pins.setdefault(found[1], []).append(line)
    return pins


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def digest_files(paths: Iterable[Path]) -> str:
    return digest(*(f"{path.relative_to(ROOT)}:{path.read_bytes()!r}" for path in sorted(paths)))


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of c++, g++ and clang++ on the PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(shlex.split(name)[0])), None)


def check_python(version: Sequence[int], executable: str) -> None:
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        found = ".".join(str(part) for part in version[:2])
        raise SetupError(
            f"Python 3.10 to 3.13 is needed, {executable} is {found}; "
            "name another one with make PYTHON=..."
        )


def check_machine(free_gb: float) -> None:
    """Stop with one sentence when this machine cannot carry the set-up; free_gb is demanded."""
    python = "python{}.{}".format(*sys.version_info)
    if (machine := (sys.platform, platform.machine())) != ("linux", "x86_64"):
        raise SetupError(f"the set-up is for Linux on x86_64, this is {' on '.join(machine)}")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments: "
            f"install {python}-venv (apt install {python}-venv)"
        ) from None
    if find_compiler() is None:
        wanted = os.environ.get("CXX") or "c++, g++ or clang++"
        raise SetupError(
            f"no C++ compiler found ({wanted}), and mmcv has to be compiled: "
            "install g++ (apt install g++)"
        )
    if not (header := Path(sysconfig.get_paths()["include"], "Python.h")).is_file():
        raise SetupError(
            f"{header} is missing, and mmcv has to be compiled: "
            f"install {python}-dev (apt install {python}-dev)"
        )
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < free_gb:
        raise SetupError(f"{ROOT} needs {free_gb} GB of disk space, {free:.1f} are free")


def pip_progress(log: str, total: int) -> str:
    """'12/80 packages' and so on, from what pip has written so far."""
    if "Installing collected packages" in log:
        return "unpacking"
    if files := re.findall(r"^  Downloading ([\w.]+)-\S+\.whl \((.+)\)", log, re.M):
        return f"fetching {files[-1][0]} ({files[-1][1]})"
    seen = len(set(re.findall(r"^Collecting ([\w.-]+)", log, re.M)))
    return f"{seen}/{total} packages" if total else f"{seen} packages found"


def ninja_progress(log: str) -> str:
    """'file 12/78', from what ninja has written so far."""
    marks = re.findall(r"^\s*\[(\d+)/(\d+)\]", log, re.M)
    return "file {}/{}".format(*marks[-1]) if marks else "preparing"


class Runner:
    """Runs commands: all output to a log, a line of progress now and then."""

    def __init__(self, logs: Path, steps: Sequence[str]):
        self.logs = logs
        self.steps = list(steps)
        self.start = time.monotonic()

    def say(self, step: str, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        number = f"[{self.steps.index(step) + 1}/{len(self.steps)}]"
        print(f"{number} {minutes}:{seconds:02d} {step}: {text}", flush=True)

    def run(
        self,
        step: str,
        command: Sequence[str],
        progress: Callable[[str], str] = lambda log: "working",
        env: dict[str, str] | None = None,
    ) -> None:
        """Run a command; SetupError with the end of its log if it fails."""
        path = self.logs / f"{step}.log"
        with path.open("a") as log:
            print("$", shlex.join(command), file=log, flush=True)
            start = log.tell()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PIP_USER": "0", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # to be stopped together with what it starts
                close_fds=False,  # keeps the lock for as long as it runs, see lock()
            )
        try:
            while process.poll() is None:
                try:
                    process.wait(SECONDS_PER_REPORT)
                except subprocess.TimeoutExpired:
                    self.say(step, progress(path.read_bytes()[start:].decode(errors="replace")))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        if process.returncode:
            raise SetupError(self.explain(step, process.returncode, path))

    def explain(self, step: str, status: int, path: Path) -> str:
        log = path.read_text(errors="replace")
        lines = [line for line in log.splitlines() if line.strip() and PIP_NOISE not in line]
        advice = "put that right"
        if "DO NOT MATCH THE HASHES" in log:
            advice = "find out where that file comes from: requirements.txt has another hash"
        elif re.search(r"Retrying \(|No matching distribution|ConnectionError", log):
            advice = "check that pip can reach its package index"
        elif "No space left" in log:
            advice = "make room on the disk"
        return (
            f"step {step!r} ended with status {status}; the last lines of its log:\n"
            + "\n".join("    " + line[:300] for line in lines[-15:])
            + f"\nThe whole log is {path}.\nTo go on from this step, {advice} and run the same "
            "command again."
        )


class Setup:
    """The steps. A step whose stamp holds its key has nothing to do."""

    def __init__(self, venv: Path):
        self.venv = venv
        self.python = str(venv / "bin" / "python")
        self.state = venv / "setup"
        pins = parse_requirements((ROOT / "requirements.txt").read_text())
        kinds = {".cpp", ".h", ".cu", ".cuh"}
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds]
        (self.detectron2,), (self.mmcv,) = pins.pop(DETECTRON2), pins.pop(MMCV)
        self.build_tools = [line for name in BUILD_TOOLS for line in pins[name]]
        self.packages = [line for lines in pins.values() for line in lines]
        compiled = digest(*pins["torch"], *self.build_tools)
        self.keys = {
            "packages": digest(*self.packages),
            "detectron2": digest(self.detectron2),
            "mmcv": digest(compiled, self.mmcv, digest_files([ROOT / "tools/build_mmcv.py"])),
            "project": digest(compiled, str(ROOT), digest_files([ROOT / "pyproject.toml"])),
            "extension": digest(compiled, digest_files([*sources, ROOT / "setup.py"])),
        }
        self.keys["verify"] = digest(VERIFY, *self.keys.values())
        self.runner = Runner(self.state, list(self.keys))
        self.cut_off: set[str] = set()

    def ask(self, code: str) -> str:
        """What the environment's Python prints for some code."""
        return subprocess.check_output([self.python, "-c", code], text=True).strip()

    def venv_works(self) -> bool:
        code = f"import pip, sys; assert {OLDEST} <= sys.version_info[:2] <= {NEWEST}"
        try:
            return not subprocess.run([self.python, "-c", code], capture_output=True).returncode
        except OSError:
            return False

    def pending(self) -> list[str]:
        """The steps that are to be done, in their order."""
        stamps = {name: self.state / f"{name}.stamp" for name in self.keys}
        done = {name for name, path in stamps.items() if path.is_file()}
        done = {name for name in done if stamps[name].read_text() == self.keys[name]}
        if not any((ROOT / "elsa_core").glob("_C*.so")):
            done.discard("extension")
        if not self.venv_works():
            done.clear()
        return [name for name in self.keys if name not in done]

    def run(self) -> None:
        """Do what is pending, step by step."""
        pending = self.pending()
        if not pending:
            return
        check_machine(DISK_GB if "packages" in pending else 0)
        if not self.venv_works():
            print(f"Making {self.venv}: a few minutes, about {DISK_GB} GB", flush=True)
            command = [sys.executable, "-m", "venv", "--clear", str(self.venv)]
            made = subprocess.run(command, text=True, capture_output=True)
            if made.returncode:
                output = (made.stdout + made.stderr).strip()
                raise SetupError(f"{shlex.join(command)} failed:\n{output}")
        self.state.mkdir(exist_ok=True)
        for name in pending:
            self.do(name)
        self.runner.say("verify", f"{self.venv} is ready")

    def do(self, name: str) -> None:
        """Run one step and stamp it."""
        began = time.monotonic()
        mark = self.state / f"{name}.started"
        if mark.exists():
            self.cut_off.add(name)
        mark.touch()
        (self.state / f"{name}.log").unlink(missing_ok=True)
        (self.state / f"{name}.stamp").unlink(missing_ok=True)
        getattr(self, f"step_{name}")()
        (self.state / f"{name}.stamp").write_text(self.keys[name])
        mark.unlink()
        self.runner.say(name, f"done in {time.monotonic() - began:.0f} s")

    def install(self, step: str, *arguments: str, total: int = 0) -> None:
        """`pip install`, without trust in what an attempt that was cut off has left."""
        again = ["--ignore-installed"] if step in self.cut_off else []
        # Compiling every module of 5 GB of packages takes longer than it will ever save.
        options = ["--no-deps", "--no-build-isolation", "--no-compile", *again]
        command = self.pip("install", *options, *arguments)
        self.runner.run(step, command, lambda log: pip_progress(log, total), self.build_env())

    def install_pins(self, step: str, pins: Sequence[str], *options: str) -> None:
        path = self.state / f"{step}.txt"
        path.write_text("".join(f"{pin}\n" for pin in pins))
        total = len({pin.split("==")[0] for pin in pins})
        self.install(step, "--require-hashes", "-r", str(path), *options, total=total)

    def pip(self, *arguments: str) -> list[str]:
        return [self.python, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]

    def build_env(self) -> dict[str, str]:
        memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
        jobs = max(1, min(len(os.sched_getaffinity(0)), int(memory_gb / 1.5)))
        return {
            "PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}",  # where torch looks for ninja
            "CXX": find_compiler() or "c++",
            "MAX_JOBS": os.environ.get("MAX_JOBS") or str(jobs),
        }

    def step_packages(self) -> None:
        # First what the packages that are published as source are made with.
        self.install_pins("packages", self.build_tools)
        self.install_pins("packages", self.packages)

    def step_detectron2(self) -> None:
        target = self.ask("import sysconfig; print(sysconfig.get_paths()['purelib'])")
        tag = ["--only-binary=:all:", "--python-version", "3.10", "--target", target, "--upgrade"]
        self.install_pins("detectron2", [re.sub(" ; .+'", "", self.detectron2)], *tag)

    def step_mmcv(self) -> None:
        folder = self.state / "mmcv"
        shutil.rmtree(folder, ignore_errors=True)
        name, hashes = self.mmcv.split()[0], re.findall(r"--hash=(\S+)", self.mmcv)
        command = [self.python, "tools/build_mmcv.py", name, "--out", str(folder)]
        command += [f"--hash={value}" for value in hashes]
        self.runner.run("mmcv", command, ninja_progress, self.build_env())
        self.install("mmcv", "--force-reinstall", str(next(folder.glob("*.whl"))))

    def step_project(self) -> None:
        command = self.pip("install", "--no-build-isolation", "--no-deps", "-e", ".")
        self.runner.run("project", command, env={"ELSA_BUILD_EXTENSION": "0"})

    def step_extension(self) -> None:
        # Not through pip, which starts from nothing each time: ninja compiles only what changed.
        command = [self.python, "setup.py", "build_ext", "--inplace", "--force"]
        self.runner.run("extension", command, ninja_progress, self.build_env())

    def step_verify(self) -> None:
        self.runner.run("verify", [self.python, "-c", VERIFY])


def lock(folder: Path) -> int:
    """Wait until no set-up works in the folder, nor a command that a killed one has left behind."""
    handle = os.open(folder, os.O_RDONLY)
    os.set_inheritable(handle, True)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Waiting for another set-up in this folder to end", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: %(default)s")
    venv = parser.parse_args(argv).venv.absolute()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        check_python(sys.version_info, sys.executable)
        handle = lock(ROOT)
        Setup(venv).run()
        os.close(handle)
    except SetupError as error:
        print(f"Set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Set-up interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
