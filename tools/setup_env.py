"""Make .venv ready for work: the pinned stack, a compiled mmcv, our extension, a smoke test.

Run by `make`; safe to run at any time, since only what is missing or out of date is done.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 10), (3, 12)
DISK_GB = 9
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
    """Sections of requirements.txt: heading -> requirement lines, each with an exact version."""
    sections: dict[str, list[str]] = {}
    for line in text.splitlines():
        if heading := re.match(r"# \[(\w+)\]", line):
            sections[heading[1]] = []
        elif line.strip() and not line.startswith("#"):
            if not sections or not re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line):
                raise SetupError(f"requirements.txt: not `name==version` under a heading: {line!r}")
            sections[list(sections)[-1]].append(line)
    return sections


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
            f"Python 3.10, 3.11 or 3.12 is needed, {executable} is {found}; "
            "name another one with make PYTHON=..."
        )


def check_machine(free_gb: float) -> None:
    """Stop with one sentence when this machine cannot carry the set-up; free_gb is demanded."""
    python = "python{}.{}".format(*sys.version_info)
    if not sys.platform.startswith("linux"):
        raise SetupError(f"the set-up is for Linux, this is {sys.platform}")
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
        self.stop = threading.Event()
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
        """Run a command; SetupError with the end of its log if it fails or another step did."""
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
        reported = time.monotonic()
        try:
            while process.poll() is None:
                if self.stop.wait(0.1):
                    raise SetupError(f"step {step!r} was stopped")
                if time.monotonic() - reported >= SECONDS_PER_REPORT:
                    reported = time.monotonic()
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
        if re.search(r"Retrying \(|No matching distribution|ConnectionError", log):
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
        self.pins = parse_requirements((ROOT / "requirements.txt").read_text())
        kinds = {".cpp", ".h", ".cu", ".cuh"}
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds]
        torch = digest(*self.pins["torch"], *self.pins["build"])
        self.keys = {
            "torch": torch,
            "mmcv": digest(torch, digest_files([ROOT / "tools/build_mmcv.py"]), *self.pins["mmcv"]),
            "packages": digest(*self.pins["packages"]),
            "detectron2": digest(*self.pins["detectron2"]),
            "project": digest(torch, str(ROOT), digest_files([ROOT / "pyproject.toml"])),
            "extension": digest(torch, digest_files([*sources, ROOT / "setup.py"])),
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
        """Do what is pending; mmcv is compiled while the other packages are installed."""
        pending = self.pending()
        if not pending:
            return
        check_machine(DISK_GB if "torch" in pending else 0)
        if not self.venv_works():
            print(f"Making {self.venv}: a few minutes, about {DISK_GB} GB", flush=True)
            command = [sys.executable, "-m", "venv", "--clear", str(self.venv)]
            made = subprocess.run(command, text=True, capture_output=True)
            if made.returncode:
                output = (made.stdout + made.stderr).strip()
                raise SetupError(f"{shlex.join(command)} failed:\n{output}")
        self.state.mkdir(exist_ok=True)
        beside_mmcv = ["packages", "detectron2"]
        for lanes in ([["torch"]], [["mmcv"], beside_mmcv], [["project", "extension", "verify"]]):
            self.run_lanes([[name for name in lane if name in pending] for lane in lanes])
        self.runner.say("verify", f"{self.venv} is ready")

    def run_lanes(self, lanes: list[list[str]]) -> None:
        """Run lists of steps side by side; the first failure stops them all."""
        with ThreadPoolExecutor(len(lanes)) as pool:
            jobs = [pool.submit(lambda lane: [self.do(name) for name in lane], x) for x in lanes]
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                failures = [error for job in done if (error := job.exception())]
                if failures:
                    raise failures[0]
            except BaseException:
                self.runner.stop.set()
                raise

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
        command = self.pip("install", "--no-build-isolation", "--no-compile", *again, *arguments)
        self.runner.run(step, command, lambda log: pip_progress(log, total), self.build_env())

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

    def requirement_file(self, section: str) -> str:
        path = self.state / f"{section}.txt"
        path.write_text("\n".join(self.pins[section]) + "\n")
        return str(path)

    def step_torch(self) -> None:
        self.install("torch", "--no-deps", *self.pins["build"])
        wanted = [pin for pin in self.pins["torch"] if pin.startswith("torch")]
        self.install("torch", *wanted, "-c", self.requirement_file("torch"))

    def step_packages(self) -> None:
        wanted = self.requirement_file("packages")
        self.install("packages", "--no-deps", "-r", wanted, total=len(self.pins["packages"]))

    def step_detectron2(self) -> None:
        target = self.ask("import sysconfig; print(sysconfig.get_paths()['purelib'])")
        tag = ["--only-binary=:all:", "--python-version", "3.10", "--target", target, "--upgrade"]
        self.install("detectron2", "--no-deps", *tag, *self.pins["detectron2"])

    def step_mmcv(self) -> None:
        folder = self.state / "mmcv"
        command = [self.python, "tools/build_mmcv.py", *self.pins["mmcv"], "--out", str(folder)]
        self.runner.run("mmcv", command, ninja_progress, self.build_env())
        self.install("mmcv", "--no-deps", "--force-reinstall", str(next(folder.glob("*.whl"))))

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
