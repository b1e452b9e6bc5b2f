"""Compile mmcv's CPU operators into a wheel for the PyTorch of this Python, in a few minutes.

    python tools/build_mmcv.py mmcv==2.1.0 --out wheels
    pip install wheels/mmcv-2.1.0-*.whl

Compiles any release of mmcv or onedl-mmcv from 2.1.0 on; needs a C++ compiler. pip alone takes more
than ten times as long, as it compiles PyTorch's headers for each file instead of once. Installs
nothing into the environment. Keeps the wheel in ~/.cache/elsa-swin (or $XDG_CACHE_HOME) for the
next time.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

# -O1: models spend little of their time in mmcv's loops.
FLAGS = "-O1 -g0"
GROUPS = 4
# With a visible GPU, mmcv would compile with nvcc, which takes far longer.
NO_CUDA = {"CUDA_VISIBLE_DEVICES": "", "FORCE_CUDA": "0", "MMCV_WITH_OPS": "1"}
PIP = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
# What mmcv's setup.py imports, and the distribution that has it.
BUILD_TOOLS = {"pkg_resources": "setuptools<81", "wheel": "wheel", "ninja": "ninja"}
# Wraps the compiler. A pre-compiled header is used only with the flags that it was compiled with,
# which depend on the versions of PyTorch and mmcv: so the first command compiles the header, too.
COMPILER = """\
#!{python} -ES
import fcntl, os, subprocess, sys
command = {compiler!r} + sys.argv[1:] + {flags!r}
if "-c" in command:
    files = {{command[command.index(option) + 1] for option in ("-o", "-MF") if option in command}}
    others = {{"-c", "-o", "-MF", "-MMD", *files}}
    flags = [flag for flag in command if flag not in others and not flag.endswith(".cpp")]
    with open({header!r} + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists({header!r} + ".gch"):
            made = flags + ["-x", "c++-header", {header!r}, "-o", {header!r} + ".gch"]
            if subprocess.call(made):
                sys.exit(1)
    command += ["-include", {header!r}, "-Winvalid-pch"]
os.execvp(command[0], command)
"""


class BuildError(Exception):
    """One sentence: what is wrong and what to do."""


def find_compiler() -> list[str]:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in map(shlex.split, names):
        if shutil.which(name[0]):
            return name
    wanted = os.environ.get("CXX") or "c++, g++ or clang++"
    raise BuildError(f"no C++ compiler found ({wanted}): install g++ (apt install g++)")


def torch_version() -> str:
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            f"mmcv is compiled for the PyTorch that it will run with, and {sys.executable} has "
            f"none that can be imported ({error}): install it first"
        ) from None
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        python = "python{}.{}-dev".format(*sys.version_info)
        raise BuildError(f"{header} is missing: install {python} (apt install {python})")
    return torch.__version__


def run(command: list[str], log: Path, what: str, **env: str) -> None:
    """Run a command; print its progress and, if it fails, the errors in its output."""
    start = time.monotonic()
    print(f"mmcv: {what}", flush=True)
    with (
        log.open("a") as file,
        subprocess.Popen(
            command,
            env={**os.environ, **env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            if mark := re.match(r"\s*(\[\d+/\d+\])", line):  # of ninja
                print(f"{mark[1]} files, {time.monotonic() - start:.0f} s", flush=True)
    if process.returncode:
        text = log.read_text()
        if re.search(r"No matching distribution found|Could not find a version", text):
            known = re.search(r"\(from versions: (.+)\)", text)
            there = f"; there is {known[1]}" if known and known[1] != "none" else ""
            raise BuildError(f"{what} failed: pip finds no such source{there}")
        lines = text.splitlines()
        errors = [line for line in lines if re.search(r"\b(fatal error|error|ERROR):", line)]
        print("\n".join((errors or lines)[-12:]), file=sys.stderr)
        raise BuildError(f"{what} failed with status {process.returncode}, for the reason above")


def group_sources(folder: Path) -> None:
    """Merge a folder's files into GROUPS that include them: even with the pre-compiled header, an
    empty file takes 2 s. The large file of the Python bindings stays alone."""
    files = sorted(path for path in folder.glob("*.cpp") if path.name != "pybind.cpp")
    parts = folder / "parts"
    parts.mkdir()
    for path in files:
        path.rename(parts / path.name)
    for index in range(GROUPS):
        lines = [f'#include "parts/{path.name}"\n' for path in files[index::GROUPS]]
        (folder / f"group_{index}.cpp").write_text("".join(lines))


def write_compiler(folder: Path) -> Path:
    """Write a compiler that pre-compiles folder/header.h and includes it into every file."""
    path = folder / "g++"  # torch looks at the name
    path.write_text(
        COMPILER.format(
            python=sys.executable,
            compiler=find_compiler(),
            flags=FLAGS.split(),
            header=str(folder / "header.h"),
        )
    )
    path.chmod(0o755)
    return path


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive; write nothing outside the folder."""
    # Python checks that from 3.10.12 and 3.11.4 on.
    looking = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    try:
        shutil.unpack_archive(archive, folder, **looking)
    except tarfile.TarError as error:
        raise BuildError(f"{archive.name} is not unpacked: {error}") from error


def compile_wheel(requirement: str, hashes: list[str], scratch: Path) -> Path:
    """Make the wheel below scratch and return its path."""
    log = scratch / "log"
    compiler = write_compiler(scratch)
    (scratch / "header.h").write_text("#include <torch/types.h>\n")
    tools = scratch / "tools"
    env = {**NO_CUDA, "TMPDIR": str(scratch), "CXX": str(compiler)}
    if missing := [BUILD_TOOLS[name] for name in BUILD_TOOLS if not find_spec(name)]:
        # For this build alone: the environment stays as it is.
        run([*PIP, "install", "-q", "--target", str(tools), *missing], log, "fetching tools")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tools), os.getenv("PYTHONPATH")]))
    places = [str(tools / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    env["PATH"] = os.pathsep.join(places)

    asked = scratch / "requirement.txt"
    asked.write_text(" ".join([requirement, *(f"--hash={value}" for value in hashes)]))
    options = ["--no-deps", "--no-build-isolation"]
    fetch = [*PIP, "download", *options, "--no-binary", ":all:", "-d", str(scratch)]
    run([*fetch, "-r", str(asked)], log, f"fetching {requirement}", **env)
    unpack(next(scratch.glob("*.tar.gz")), scratch / "source")
    (source,) = (scratch / "source").iterdir()
    group_sources(source / "mmcv/ops/csrc/pytorch")
    # Without a standard of mmcv's, torch names the one that its headers need.
    setup = source / "setup.py"
    setup.write_text(re.sub(r"'-std=c\+\+\d+'", "'-DNDEBUG'", setup.read_text()))
    wheels = scratch / "wheel"
    run(
        [*PIP, "wheel", "-v", *options, "-w", str(wheels), str(source)],
        log,
        f"compiling for PyTorch {torch_version()}",
        **env,
    )
    return next(wheels.glob("*.whl"))


def loads(wheel: Path) -> bool:
    """Whether the extension in a wheel loads into this process."""
    import torch  # noqa: F401  the libraries that it is linked to

    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(wheel) as archive:
                name = next(n for n in archive.namelist() if n.startswith("mmcv/_ext."))
                ctypes.CDLL(archive.extract(name, folder))
        except (OSError, StopIteration, zipfile.BadZipFile) as error:
            print(f"{wheel} does not load: {error}", flush=True)
            return False
    return True


def cache_folder(requirement: str) -> Path:
    """Return the folder of the wheel for this Python, torch, compiler and C library."""
    compiler = subprocess.check_output([*find_compiler(), "--version"], text=True)
    parts = [requirement, FLAGS, torch_version(), sysconfig.get_config_var("SOABI"), compiler]
    key = hashlib.sha256("\0".join([*parts, *platform.libc_ver()]).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "elsa-swin", f"mmcv-{key}")


def distrust(wheel: Path) -> str | None:
    """Return why not to use a cached wheel; None if it is the user's own and unchanged.

    Its code runs as this user, so nobody else may be able to write it.
    """
    record = wheel.with_suffix(".sha256")
    for path in (wheel.parent.parent, wheel.parent, wheel, record):
        try:
            found = path.lstat()
        except FileNotFoundError:
            return f"there is no {path.name} beside it"
        if stat.S_ISLNK(found.st_mode):
            return f"{path} is a symbolic link"
        if found.st_uid != os.geteuid():
            return f"{path} belongs to another user"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write to {path}"
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != record.read_text().strip():
        return "it has changed since it was compiled"
    return None


def place(wheel: Path, folder: Path) -> Path:
    """Copy the wheel into a folder, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        return Path(shutil.copy(wheel, fresh)).replace(folder / wheel.name)


def keep(wheel: Path, folder: Path) -> None:
    """Put the wheel and its hash into the cache, which nobody else may write."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder.parent, folder):
        path.chmod(0o700)
    kept = place(wheel, folder)
    record = kept.with_suffix(".sha256")
    record.write_text(hashlib.sha256(kept.read_bytes()).hexdigest() + "\n")
    for path in (kept, record):
        path.chmod(0o600)


def cached_wheel(folder: Path) -> Path | None:
    for wheel in sorted(folder.glob("*.whl")):
        if reason := distrust(wheel):
            print(f"{wheel} is not used, as {reason}: mmcv is compiled again", flush=True)
        elif loads(wheel):
            return wheel
    return None


def build(requirement: str, hashes: list[str], out: Path) -> Path:
    torch_version()
    cache = cache_folder(requirement)
    if wheel := cached_wheel(cache):
        print(f"Compiled earlier: {wheel}", flush=True)
        return place(wheel, out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        wheel = compile_wheel(requirement, hashes, Path(scratch).absolute())
        if not loads(wheel):
            raise BuildError("mmcv was compiled, but does not load")
        try:
            keep(wheel, cache)
        except OSError as error:
            print(f"Not kept for the next time: {error}", flush=True)
        return place(wheel, out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("requirement", help="NAME==VERSION, such as mmcv==2.1.0")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the wheel (default .)")
    parser.add_argument(
        "--hash",
        action="append",
        default=[],
        metavar="sha256:...",
        help="of the source; the build stops if what pip fetches has another one",
    )
    options = parser.parse_args(argv)
    if not re.fullmatch(r"(onedl-)?mmcv==[\w.]+", options.requirement):
        parser.error(f"mmcv==VERSION or onedl-mmcv==VERSION is needed, got {options.requirement!r}")
    start = time.monotonic()
    try:
        wheel = build(options.requirement, options.hash, options.out)
    except (BuildError, OSError) as error:
        print(f"mmcv was not built: {error}", file=sys.stderr)
        return 2
    print(f"Ready in {time.monotonic() - start:.0f} s: pip install {shlex.quote(str(wheel))}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # clean up
    sys.exit(main())
