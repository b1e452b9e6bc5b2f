"""Builds the compiled operator; everything else about the package stands in pyproject.toml.

ELSA_BUILD_EXTENSION=0 leaves the operator out, FORCE_CUDA=1 compiles the CUDA kernels without a GPU
in sight (for images built elsewhere), MAX_JOBS limits the compilers that run at the same time.
"""

import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CXX_FLAGS = [
    "-O3",
    "-g0",  # Python's own flags ask for debug information: most of the file's size
    "-std=c++17",
    "-fvisibility=hidden",
    # ATen's parallel_for lives in headers and runs on one thread when compiled without OpenMP.
    "-fopenmp",
]


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in CSRC.glob(pattern))


def say(text: str) -> None:
    """Print once per installation: setup.py also runs when only metadata is asked for."""
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print("elsa-swin: " + text, file=sys.stderr)


def check_wheel() -> None:
    """Before version 70.1 setuptools leaves wheels to a package that may not be there."""
    if not any(map(find_spec, ("setuptools.command.bdist_wheel", "wheel"))):
        sys.exit(
            f"elsa-swin: setuptools {setuptools.__version__} cannot make wheels alone: "
            "run 'pip install wheel' first"
        )


def find_compiler() -> bool:
    """Whether there is a C++ compiler; names it in CXX where torch would look for another one."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(shlex.split(name)[0]):
            os.environ["CXX"] = name
            return True
    return False


def extension_arguments() -> dict:
    """Arguments of setup() that build elsa_core/_C.so; none where it is not to be built."""
    if os.environ.get("ELSA_BUILD_EXTENSION", "1") == "0":
        say("ELSA_BUILD_EXTENSION=0, so the compiled operator is left out")
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        if error.name != "torch":
            raise
        sys.exit(
            "elsa-swin is compiled against the PyTorch that it will run with: install torch first, "
            "then run 'pip install --no-build-isolation .'"
        )
    if not find_compiler():
        wanted = os.environ.get("CXX") or "c++, g++ or clang++"
        say(
            f"no C++ compiler found ({wanted}), so the package is installed without its compiled "
            "operator and will be slower"
        )
        return {}

    cuda_sources = sources("cuda/*.cu")
    gpu = torch.cuda.is_available() and cpp_extension.CUDA_HOME is not None
    with_cuda = cuda_sources and (gpu or os.environ.get("FORCE_CUDA", "0") == "1")
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    flags = {"cxx": CXX_FLAGS}
    if with_cuda:
        flags["nvcc"] = ["-O3", "-std=c++17"]
    extension = make(
        "elsa_core._C",
        sources=sources("*.cpp", "cpu/*.cpp") + (cuda_sources if with_cuda else []),
        depends=sources("**/*.h", "**/*.cuh"),
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
        # Kernels reach Python through the dispatcher alone, so one build serves every Python.
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {
            "build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)
        },
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


check_wheel()
setuptools.setup(**extension_arguments())
