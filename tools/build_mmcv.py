"""Compile mmcv's CPU operators into a wheel for the torch of this Python, 15 times faster than pip.

Almost all of the 78 files' time goes into torch's headers. So these are pre-compiled, and the many
small files are compiled in a few groups. Finished wheels are kept under ~/.cache/elsa-swin (or
$XDG_CACHE_HOME) and taken from there next time.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths

# The header and the sources that include it must be compiled with the same flags, or gcc ignores
# the pre-compiled header without a word. -O1: mmcv's loops are not where the time of a model goes.
FLAGS = "-O1 -g0 -DNDEBUG -fPIC"
GROUPS = 4
# With a GPU in sight mmcv would turn to nvcc: another and far longer build.
NO_CUDA = {"CUDA_VISIBLE_DEVICES": "", "FORCE_CUDA": "0"}


def call(command: list[str], **env: str) -> None:
    print("$", shlex.join(command), flush=True)
    status = subprocess.run(command, env={**os.environ, **env}).returncode
    if status:
        sys.exit(f"mmcv was not built: {command[0]} ended with status {status}")


def precompile_header(folder: Path) -> Path:
    """Write and pre-compile the header that all of mmcv's files start with."""
    header = folder / "torch_types.h"
    header.write_text("#include <torch/types.h>\n")
    command = [*shlex.split(get_cxx_compiler()), *FLAGS.split(), "-std=c++17"]
    command += ["-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_ext"]
    command += [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    call([*command, "-x", "c++-header", str(header), "-o", f"{header}.gch"])
    return header


def group_sources(folder: Path) -> None:
    """Turn a folder's files into GROUPS that include them: even with the header pre-compiled, a
    file that holds nothing takes 2 s. The big one with the Python bindings stays alone."""
    files = sorted(path for path in folder.glob("*.cpp") if path.name != "pybind.cpp")
    parts = folder / "parts"
    parts.mkdir()
    for path in files:
        path.rename(parts / path.name)
    for index in range(GROUPS):
        lines = [f'#include "parts/{path.name}"\n' for path in files[index::GROUPS]]
        (folder / f"group_{index}.cpp").write_text("".join(lines))


def compile_wheel(requirement: str, scratch: Path) -> Path:
    """Make the wheel under scratch and return its path."""
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation"]
    source_only = ["--no-binary", ":all:", "-d", str(scratch), requirement]
    call([*pip, "download", *options, *source_only], **NO_CUDA)
    shutil.unpack_archive(next(scratch.glob("*.tar.gz")), scratch / "source")
    (source,) = (scratch / "source").iterdir()
    group_sources(source / "mmcv/ops/csrc/pytorch")

    flags = f"{FLAGS} -include {precompile_header(scratch)} -Winvalid-pch"
    env = {"CFLAGS": flags, "CXXFLAGS": flags, "MMCV_WITH_OPS": "1", "TMPDIR": str(scratch)}
    call(
        [*pip, "wheel", "-v", *options, "-w", str(scratch / "wheel"), str(source)], **env, **NO_CUDA
    )
    return next((scratch / "wheel").glob("*.whl"))


def loads(wheel: Path) -> bool:
    """Whether the compiled part of a wheel fits the torch of this process."""
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
    """Where the wheel for this Python, torch, compiler and C library is kept."""
    compiler = subprocess.check_output([*shlex.split(get_cxx_compiler()), "--version"], text=True)
    parts = [requirement, FLAGS, torch.__version__, sysconfig.get_config_var("SOABI"), compiler]
    key = hashlib.sha256("\0".join([*parts, *platform.libc_ver()]).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "elsa-swin", f"mmcv-{key}")


def place(wheel: Path, folder: Path) -> None:
    """Make folder hold this wheel only; renamed, so that it is never seen half-written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent))
    shutil.copy(wheel, fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requirement", help="for example onedl-mmcv==2.3.6")
    parser.add_argument("--out", type=Path, required=True, help="folder to make for the wheel")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # clean up
    cache = cache_folder(options.requirement)
    for wheel in cache.glob("*.whl"):
        if loads(wheel):
            print(f"Compiled earlier: {wheel}")
            return place(wheel, options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as scratch:
        wheel = compile_wheel(options.requirement, Path(scratch).absolute())
        if not loads(wheel):
            sys.exit("mmcv was compiled, but does not load")
        place(wheel, options.out)
        try:
            place(wheel, cache)
        except OSError as error:
            print(f"Not kept for the next time: {error}")


if __name__ == "__main__":
    main()
