"""Compiles the CUDA kernels for the CPU, with tests/cuda_emulation in the place of CUDA."""

import os
import shutil
import subprocess
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

from elsa_core._range import TORCH_WITH_EXTENSION as TARGET

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests/cuda_emulation"
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
SOURCES = [*sorted(EMULATION.glob("*.cpp")), *KERNELS]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "g++"
# The standard that the headers of the newest PyTorch need.
FLAGS = ["-O2", "-g0", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
FLAGS += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*TARGET)]
# longjmp to another stack is what the emulation does.
FLAGS += ["-U_FORTIFY_SOURCE", f"-I{EMULATION / 'include'}"]
# Instead of the header that has the same in the GPU's own language.
FLAGS += ["-include", EMULATION / "include/instructions.cuh"]


def compiled(*arguments):
    done = subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def compile_objects(folder, sources):
    """The object files, in the folder."""
    headers = [f"-isystem{path}" for path in include_paths()]
    objects = [folder / f"{source.name}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        compiled(*FLAGS, *headers, "-xc++", "-c", source, "-o", target)
    return objects


def link(target, objects, *options):
    torch = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    # Its own stand-ins for LibTorch's functions come first.
    libraries = ["-Wl,-Bsymbolic", "-Wl,--no-as-needed", "-ltorch"]
    compiled(*options, "-o", target, *objects, *torch, *libraries)


def build(folder):
    """Makes the folder's elsa_core one whose kernels for the CPU are those for CUDA."""
    shutil.copytree(ROOT / "elsa_core", folder / "elsa_core", ignore=shutil.ignore_patterns("*.so"))
    link(folder / "elsa_core/_C.so", compile_objects(folder, SOURCES), "-shared")
