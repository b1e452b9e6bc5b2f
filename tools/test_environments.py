"""Make fresh environments as users have them, and run in each what the README and the guides say.

For each environment of tools/environments.py: make a virtual environment from the package registry
(with uv if available), install the user's packages and then ours, and run the doctor, tests,
trainings and predictions in a copy of this source tree. `pip freeze` before and after must agree:
our package replaces none of the user's. OUT/environments.md gets the final table,
OUT/environments.json also the commands and the added packages, OUT/logs the output.

Skips an environment without its Python, its wheel (from `make wheel`) or its checkout of Detectron2
(named by the environment variable DETECTRON2); the table says why. Needs 10 GB of disk temporarily.

Exit status: 0 all that ran passed, 1 one failed or one named with --only could not be made,
2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tools"), str(ROOT / "tests/helpers")]

from docs_blocks import read_blocks  # noqa: E402
from environments import ENVIRONMENTS, NEWEST, Environment, Step  # noqa: E402

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SECONDS = 1200  # that a step may take
COMPILERS = re.compile(r"(.*-)?(cc|gcc|g\+\+|c\+\+|clang|clang\+\+|c89|c99|cpp|nvcc)(-[\d.]+)?")
REGISTRY = re.compile(
    r"No matching distribution|Retrying \(|ConnectionError|[Cc]lient error|error sending request"
    r"|Failed to fetch|dns error"
)
FRAMEWORKS = re.compile(
    r"(detectron2|sal-detectron2|(onedl-)?mm(engine|cv|det|detection|segmentation))"
)


class Failure(Exception):
    """A failure, in words for the table and the terminal."""


@dataclass
class Row:
    """A line of the table."""

    environment: str
    result: str = "passed"
    python: str = ""
    torch: str = ""
    frameworks: str = ""
    seconds: int = 0
    counted: float | None = None
    ran: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        return self.result.partition(":")[0]


def find_pythons(named: Iterable[str] = ()) -> dict[str, str]:
    """Return interpreters by version; named ones go first."""
    on_path = [f"python{version}" for version in PYTHONS]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    found: dict[str, str] = {}
    for name in [*named, sys.executable, *on_path, *map(str, sorted(pyenv.glob("3*/bin/python")))]:
        if path := shutil.which(name):
            code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
            version = subprocess.run([path, "-c", code], capture_output=True, text=True).stdout
            if version.strip() in PYTHONS:
                found.setdefault(version.strip(), path)
    for name in named:
        if not shutil.which(name) or shutil.which(name) not in found.values():
            raise Failure(f"--python {name} is no Python of {PYTHONS[0]} to {PYTHONS[-1]}")
    return found


def changes(before: str, after: str) -> tuple[list[str], list[str]]:
    """Compare two outputs of `pip freeze`: return (lost or replaced, added) packages."""
    old, new = ({line for line in text.splitlines() if line.strip()} for text in (before, after))
    key = re.compile(r"\s*(==|@).*")
    later = {key.sub("", line).lower(): line for line in sorted(new)}
    earlier = {key.sub("", line).lower(): line for line in old}
    lost = [
        f"{earlier[name]} -> {later.get(name, 'gone')}"
        for name in earlier
        if earlier[name] not in new
    ]
    added = [later[name] for name in later.keys() - earlier.keys()]
    return sorted(lost), sorted(added)


def copy_tree(target: Path) -> None:
    """Copy the files of the source tree that git does not ignore."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    for name in subprocess.check_output(listed, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def without_compilers(folder: Path) -> None:
    """Fill a folder with links to the programs on the PATH, except compilers."""
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(":")):
        for file in Path(place).iterdir() if Path(place).is_dir() else ():
            if not COMPILERS.fullmatch(file.name) and not file.name.startswith(("python", "pip")):
                (folder / file.name).unlink(missing_ok=True)
                (folder / file.name).symlink_to(file)


def code_of(page: str, word: str) -> str:
    blocks = read_blocks((ROOT / page).read_text())
    found = [b.code for b in blocks if b.language == "python" and word in b.code]
    if len(found) != 1:
        raise Failure(f"{page} has {len(found)} blocks of Python with {word!r}, one is wanted")
    return found[0]


class Machine:
    """An environment that is made and used."""

    def __init__(self, spec: Environment, options: argparse.Namespace, python: str):
        self.spec, self.options, self.base = spec, options, python
        self.folder = options.out / "work" / spec.name
        self.venv, self.tree = self.folder / "venv", self.folder / "tree"
        self.log = options.out / "logs" / f"{spec.name}.log"
        self.row = Row(spec.name)
        self.variables: dict[str, str] = {}

    def run(self) -> Row:
        """Make the environment, use it and remove it; the row records failures."""
        start = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            self.make()
            for step in self.spec.prepare:
                self.do(step)
            before = self.freeze("before")
            for step in self.spec.steps:
                self.do(step)
            lost, self.row.added = changes(before, self.freeze("after"))
            if lost:
                raise Failure("pip freeze: replaced " + "; ".join(lost))
            if self.spec.limit and (self.row.counted or 0) > self.spec.limit:
                needed, allowed = f"{self.row.counted:.0f} s", f"{self.spec.limit} s are allowed"
                raise Failure(f"{needed} to the first detections, {allowed}")
        except Failure as error:
            self.row.result = f"failed: {error}"
        finally:
            self.row.seconds = round(time.monotonic() - start)
            if not self.options.keep:
                shutil.rmtree(self.folder, ignore_errors=True)
        self.say(f"{self.row.result} after {self.row.seconds} s")
        return self.row

    def make(self) -> None:
        """Make the virtual environment, the copy of the tree and the variables of the commands."""
        self.tree.mkdir()
        if self.spec.compiler:
            copy_tree(self.tree)
        else:  # a user of the wheel has no tree
            without_compilers(self.folder / "bin")
        wanted = [*self.spec.torch, *self.spec.packages]
        python = str(self.venv / "bin/python")
        if uv := self.options.uv:
            make = [uv, "venv", "-q", "--seed", "-p", self.base, str(self.venv)]
            fill = [uv, "pip", "install", "-p", python]
        else:
            make = [self.base, "-m", "venv", str(self.venv)]
            fill = [python, "-m", "pip", "install", "--no-input"]
        self.variables["INSTALL"] = shlex.join(fill)
        self.do(Step("environment", shlex.join(make)))
        self.do(Step("torch", shlex.join([*fill, *wanted])))
        code = (
            "import platform as p, sysconfig as s; print(p.python_version(), s.get_path('purelib'))"
        )
        self.row.python, site = self.ask("-c", code).split(" ", 1)
        self.variables |= {"SITE": site, "DATA": str(self.options.out / "work/data")}
        if "DETECTRON2" in self.spec.needs:
            target = self.folder / "detectron2"
            ignored = shutil.ignore_patterns(".git", "build", "*.so", "*.egg-info")
            shutil.copytree(self.options.detectron2, target, ignore=ignored, symlinks=True)
            self.variables["DETECTRON2"] = str(target)
        if "wheel" in self.spec.needs:
            self.variables["WHEEL"] = str(self.options.wheel)

    def environ(self) -> dict[str, str]:
        own = {"PYTHONPATH", "PYTHONHOME", "CC", "CXX", "CUDA_HOME"}
        kept = {name: value for name, value in os.environ.items() if name not in own}
        path = os.environ["PATH"] if self.spec.compiler else self.folder / "bin"
        quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "MPLBACKEND": "agg"}
        return {**kept, **quiet, **self.variables, "PATH": f"{self.venv / 'bin'}:{path}"}

    def do(self, step: Step) -> None:
        """Run a step; raise Failure if it does not do what it must."""
        command = step.run
        if step.block:
            (self.tree / "block.py").write_text(code_of(*step.block))
            command = "python block.py"
        start = time.monotonic()
        with self.log.open("a+") as log:
            print(f"$ {command}", file=log, flush=True)
            at = log.tell()
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=self.tree,
                env=self.environ(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # to kill it with the processes that it starts
            )
            try:
                status = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            log.seek(at)
            output = log.read()
        seconds = time.monotonic() - start
        self.row.commands.append(command)
        if problem := complaint(step, status, output):
            last = [line[:300] for line in output.splitlines() if line.strip()][-15:]
            print(*last, f"(the whole output: {self.log})", sep="\n    ")
            raise Failure(f"{step.name}: {problem}")
        if step.counted:
            self.row.counted = (self.row.counted or 0) + seconds
        self.row.ran.append(step.name)
        self.say(f"{step.name}: {seconds:.1f} s")

    def ask(self, *arguments: str) -> str:
        """Return what the environment's Python prints."""
        command = [str(self.venv / "bin/python"), *arguments]
        asked = subprocess.run(command, env=self.environ(), capture_output=True, text=True)
        if asked.returncode:
            raise Failure(f"{shlex.join(command)}: {asked.stderr.strip()[-300:]}")
        return asked.stdout.strip()

    def freeze(self, when: str) -> str:
        """Return the installed packages; record them in the row and the log."""
        text = self.ask("-m", "pip", "freeze", "--all")
        with self.log.open("a") as log:
            print(f"$ pip freeze --all  # {when}\n{text}", file=log)
        # Of packages installed from files, only wheels have the version in the name.
        form = r"^([\w.-]+)(?:==([\w.+]+)| @ .*/\w+-([\w.+]+)-[^/]+\.whl.*| @ .*)$"
        found = {name: named or built for name, named, built in re.findall(form, text, re.M)}
        self.row.torch = found.get("torch", "none")
        names = [name for name in found if FRAMEWORKS.fullmatch(name)]
        self.row.frameworks = ", ".join(f"{name} {found[name]}".strip() for name in names)
        return text

    def say(self, text: str) -> None:
        print(f"{self.spec.name}: {text}", flush=True)


def complaint(step: Step, status: int | None, output: str) -> str:
    """Return what is wrong with the result of a step, or ""."""
    if status is None:
        return f"not done after {SECONDS} s"
    if status and not step.refused:
        unreachable = ": the package registry cannot be reached, or has no such package"
        return f"exit status {status}" + (unreachable if REGISTRY.search(output) else "")
    if step.refused and not status:
        return "exit status 0, a refusal was expected"
    if step.says and not re.search(step.says, output):
        return f"its output does not say {step.says!r}"
    return ""


def obstacle(spec: Environment, options: argparse.Namespace, pythons: dict[str, str]) -> str:
    """Return why an environment cannot be made, or ""."""
    if spec.python != NEWEST and spec.python not in pythons:
        return f"there is no Python {spec.python}: name one with --python"
    if "DETECTRON2" in spec.needs and options.detectron2 is None:
        return "DETECTRON2 names no checkout of Detectron2"
    if "wheel" in spec.needs and options.wheel is None:
        return "there is no wheel in dist/: make wheel, or name one with --wheel"
    return ""


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = ["environment", "Python", "PyTorch", "frameworks", "seconds", "ran", "result"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        result = row.result
        if row.counted is not None and row.status == "passed":
            result += f", detections after {row.counted:.0f} s"
        cells = [row.environment, row.python, row.torch, row.frameworks or "-", str(row.seconds)]
        lines.append([*cells, ", ".join(row.ran) or "-", result])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def make_images(folder: Path) -> None:
    """Make images of digits, and copy a trained detector, for users without a source tree."""
    make = [sys.executable, str(ROOT / "tools/make_digits.py"), "--out", str(folder)]
    made = subprocess.run([*make, "--train=1", "--val=4"], capture_output=True, text=True)
    if made.returncode:
        raise Failure(f"tools/make_digits.py: {made.stderr.strip().splitlines()[-1]}")
    shutil.copy(ROOT / "tests/data/digits_mask_rcnn.safetensors", folder)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [spec.name for spec in ENVIRONMENTS]
    parser.add_argument("--list", action="store_true", help="list them, make none")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="these alone")
    parser.add_argument("--python", nargs="+", default=[], metavar="FILE", help="interpreters")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="default: the newest in dist/")
    parser.add_argument("--keep", action="store_true", help="do not remove the environments")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build/environments", help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    built = ROOT.glob(f"dist/*_{platform.machine()}.whl")
    options.wheel = options.wheel or max(built, key=lambda x: x.stat().st_mtime, default=None)
    if options.wheel is not None:
        options.wheel = options.wheel.absolute()
        if not options.wheel.is_file():
            parser.error(f"--wheel {options.wheel} is no file")
    checkout = os.environ.get("DETECTRON2")
    options.detectron2 = Path(checkout).absolute() if checkout else None
    if checkout and not (options.detectron2 / "detectron2/__init__.py").is_file():
        parser.error(f"DETECTRON2={checkout} is no checkout of Detectron2")
    beside = Path(sys.executable).parent / "uv"
    options.uv = str(beside) if beside.is_file() else shutil.which("uv")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    rows: list[Row] = []
    try:
        pythons = find_pythons(options.python)
        newest = max(pythons, key=lambda version: int(version.partition(".")[2]))
        chosen = [s for s in ENVIRONMENTS if not options.only or s.name in options.only]
        skips = {spec.name: obstacle(spec, options, pythons) for spec in chosen}
        if options.list:
            for spec in chosen:
                note = f"  (left out: {skips[spec.name]})" if skips[spec.name] else ""
                print(f"{spec.name}: Python {spec.python}, {', '.join(spec.torch)}{note}")
            return 0
        options.out.mkdir(parents=True, exist_ok=True)
        if any("wheel" in spec.needs and not skips[spec.name] for spec in chosen):
            make_images(options.out / "work/data")
        for number, spec in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {spec.name}", flush=True)
            if reason := skips[spec.name]:
                rows.append(Row(spec.name, f"left out: {reason}"))
                print(f"{spec.name}: left out: {reason}", flush=True)
            else:
                version = newest if spec.python == NEWEST else spec.python
                rows.append(Machine(spec, options, pythons[version]).run())
            (options.out / "environments.md").write_text(table(rows))
            data = json.dumps([asdict(row) for row in rows], indent=1)
            (options.out / "environments.json").write_text(data + "\n")
    except Failure as error:
        print(f"test_environments.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if not options.keep:
            shutil.rmtree(options.out / "work", ignore_errors=True)
    print("\n" + table(rows))
    bad = {"failed", "left out"} if options.only else {"failed"}
    return int(any(row.status in bad for row in rows))


if __name__ == "__main__":
    sys.exit(main())
