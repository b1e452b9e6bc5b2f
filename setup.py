"""Builds the compiled operator; everything else about the package stands in pyproject.toml.

ELSA_BUILD_EXTENSION=0 leaves the operator out. The CUDA kernels are compiled where there is a GPU
with a toolkit, or where CUDA_HOME or FORCE_CUDA=1 asks for them (FORCE_CUDA=0 forbids them), for
the devices in sight, or for TORCH_CUDA_ARCH_LIST, or for all in use. MAX_JOBS limits the compilers
that run at the same time.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import setuptools
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
RANGE = SimpleNamespace(**runpy.run_path(str(ROOT / "elsa_core" / "_range.py")))
SETUPTOOLS = 64  # the first with editable installations by pyproject.toml, as that file says, too
# The oldest PyTorch that the extension will load with: only what its stable ABI has is compiled.
TARGET = "0x{:02x}{:02x}000000000000".format(*RANGE.TORCH_WITH_EXTENSION)
# No -std: PyTorch adds the one that its headers need.
CXX_FLAGS = [
    "-O3",
    "-g0",  # Python's own flags ask for debug information: most of the file's size
    "-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={TARGET}",
    f"-ffile-prefix-map={ROOT}=.",
]
NVCC_FLAGS = ["-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
NVCC_FLAGS += [f"-DTORCH_TARGET_VERSION={TARGET}", "-DUSE_CUDA"]
# Compiled for where no device is in sight, as far as the toolkit knows them; the last one also as
# PTX, which later devices compile for themselves.
CUDA_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in CSRC.glob(pattern))


def say(text: str) -> None:
    """Print once per installation: setup.py also runs when only metadata is asked for."""
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print("elsa-swin: " + text, file=sys.stderr)


def check_environment() -> str | None:
    """The version of PyTorch, None where there is none; exits where anything is out of range."""
    if obstacle := RANGE.python_obstacle(sys.version_info):
        sys.exit(obstacle)
    if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
        sys.exit(
            f"elsa-swin: setuptools {setuptools.__version__} does not know pyproject.toml: "
            f"run pip install 'setuptools>={SETUPTOOLS}' wheel first"
        )
    # Before version 70.1 setuptools leaves wheels to a package that may not be there.
    if not any(map(find_spec, ("setuptools.command.bdist_wheel", "wheel"))):
        sys.exit(
            f"elsa-swin: setuptools {setuptools.__version__} cannot make wheels alone: "
            "run 'pip install wheel' first"
        )
    try:
        import torch
    except ImportError as error:
        if error.name != "torch":
            raise
        return None
    if obstacle := RANGE.torch_obstacle(torch.__version__):
        sys.exit(obstacle)
    return torch.__version__


def find_compiler() -> bool:
    """Whether there is a C++ compiler; names it in CXX where torch would look for another one."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(shlex.split(name)[0]):
            os.environ["CXX"] = name
            return True
    return False


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=Path(home) / "bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def toolkit_of(nvcc: str) -> str:
    """The folder of a compiler's toolkit, also where it is a script that runs the real compiler."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    steps = subprocess.run(command, text=True, capture_output=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    return os.path.realpath(top[1].strip('"') if top else Path(nvcc).resolve().parent.parent)


def default_archs(nvcc: str) -> str:
    """The architectures of CUDA_ARCHS that the compiler knows, as torch wants them."""
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
    return ";".join(a for a in CUDA_ARCHS if f"compute_{a.replace('.', '')}" in known) + "+PTX"


def find_cuda() -> bool:
    """Whether to compile the CUDA kernels; tells torch which toolkit and devices to do it for."""
    import torch

    force = os.environ.get("FORCE_CUDA", "")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    gpu = torch.cuda.is_available()
    if force == "0" or not sources("cuda/*.cu") or not (force or named or gpu):
        return False
    nvcc = find_nvcc()
    if torch.version.cuda is None or nvcc is None:
        obstacle = f"there is no nvcc in {named}/bin" if named else "there is no nvcc on the PATH"
        if torch.version.cuda is None:
            obstacle = f"PyTorch {torch.__version__} is built without CUDA"
        if force:
            sys.exit(f"elsa-swin: FORCE_CUDA={force} asks for the CUDA kernels, but {obstacle}")
        say(f"{obstacle}, so the CUDA kernels are left out and the operator is slower on GPUs")
        return False
    os.environ["CUDA_HOME"] = toolkit_of(nvcc)
    if not gpu and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_archs(nvcc)
    return True


def extension_arguments(torch_version: str | None) -> dict:
    """Arguments of setup() that build elsa_core/_C.so; none where it is not to be built."""
    if os.environ.get("ELSA_BUILD_EXTENSION", "1") == "0":
        say("ELSA_BUILD_EXTENSION=0, so the compiled operator is left out")
        return {}
    if torch_version is None:
        sys.exit(
            "elsa-swin is compiled with the headers of an installed PyTorch: install torch first, "
            "then run 'pip install --no-build-isolation .'"
        )
    least = RANGE.TORCH_WITH_EXTENSION
    if RANGE.numbers(torch_version) < least:
        say(
            f"the compiled operator needs PyTorch {RANGE.dotted(least)} or later, and this is "
            f"PyTorch {torch_version}, so the package is installed without it and will be slower"
        )
        return {}
    if not find_compiler():
        wanted = os.environ.get("CXX") or "c++, g++ or clang++"
        say(
            f"no C++ compiler found ({wanted}), so the package is installed without its compiled "
            "operator and will be slower"
        )
        return {}

    with_cuda = find_cuda()
    from torch.utils import cpp_extension  # looks for CUDA_HOME as soon as it is imported

    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    cuda = ["cuda/*.cpp", "cuda/*.cu"] if with_cuda else []
    cxx = [*CXX_FLAGS, f"-ffile-prefix-map={Path(cpp_extension.__file__).parents[1]}=torch"]
    flags = {"cxx": [*cxx, "-DUSE_CUDA"] if with_cuda else cxx}
    if with_cuda:
        flags["nvcc"] = NVCC_FLAGS
    extension = make(
        "elsa_core._C",
        sources=sources("*.cpp", "cpu/*.cpp", *cuda),
        depends=sources("**/*.h", "**/*.cuh"),
        extra_compile_args=flags,
        # libtorch.so names no function, but the libraries that have them: those for CUDA, too,
        # where this PyTorch has them.
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,-s", "-Wl,--no-as-needed", "-ltorch"],
        # Kernels reach Python through the dispatcher alone, so one build serves every Python.
        py_limited_api=True,
    )
    # A static runtime, so that any CUDA of PyTorch's will do.
    extension.libraries = ["cudart_static", "rt", "pthread", "dl"] if with_cuda else []

    class BuildExtension(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                sys.exit(
                    f"elsa-swin: the operator could not be compiled ({reason}): see above, or "
                    "install a wheel of elsa-swin, or set ELSA_BUILD_EXTENSION=0 to do without"
                )

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


class BuildPy(build_py):
    """Takes the configs and the command lines along, where users of each framework look for them.

    OpenMIM and MMEngine look into .mim of a package.
    """

    SHIPPED = {
        "configs/detectron2": "elsa_d2/configs",
        "tools/lazyconfig_train_net.py": "elsa_d2/tools/lazyconfig_train_net.py",
        "tools/train_net.py": "elsa_d2/tools/train_net.py",
        "configs/mmdet": "elsa_mm/.mim/configs/mmdet",
        "configs/mmpretrain": "elsa_mm/.mim/configs/mmpretrain",
        "configs/mmseg": "elsa_mm/.mim/configs/mmseg",
        "tools/train.py": "elsa_mm/.mim/tools/train.py",
        "tools/test.py": "elsa_mm/.mim/tools/test.py",
        "model-index.yml": "elsa_mm/.mim/model-index.yml",
        "MODEL_ZOO.md": "elsa_mm/.mim/MODEL_ZOO.md",
    }

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # they are found in the repository
            return
        for source, target in self.SHIPPED.items():
            place = Path(self.build_lib, target)
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.rmtree(place, ignore_errors=True)  # what an earlier build has left
                caches = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, place, ignore=caches)
            else:
                shutil.copy(ROOT / source, place)


class EggInfo(egg_info):
    """Names elsa_mm first: OpenMIM takes a distribution's first package for the one with .mim."""

    def run(self) -> None:
        super().run()
        path = Path(self.egg_info, "top_level.txt")
        names = sorted(path.read_text().split(), key=lambda name: (name != "elsa_mm", name))
        path.write_text("".join(f"{name}\n" for name in names))


arguments = extension_arguments(check_environment())
arguments["cmdclass"] = {**arguments.get("cmdclass", {}), "build_py": BuildPy, "egg_info": EggInfo}
setuptools.setup(**arguments)
