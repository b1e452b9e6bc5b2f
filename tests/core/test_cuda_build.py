"""Building the CUDA kernels: when, with which toolkit, for which devices, and that they build."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[2]


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("ELSA_BUILD_EXTENSION", "0")
    for name in ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")  # what the functions set is undone as well
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def nvcc(tmp_path):
    """A compiler that knows three architectures, in a toolkit of its own."""
    return script(
        tmp_path / "toolkit" / "bin" / "nvcc",
        f"case $1 in --dryrun) echo '#$ TOP={tmp_path}/toolkit/bin/..' >&2;;\n"
        "--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n';; esac\n",
    )


def test_toolkit_is_found_behind_scripts_and_links(setup_py, nvcc, tmp_path):
    wrapper = script(tmp_path / "elsewhere" / "nvcc", f'exec {nvcc} "$@"\n')
    link = tmp_path / "bin" / "nvcc"
    link.parent.mkdir()
    link.symlink_to(nvcc)
    for compiler in (nvcc, wrapper, str(link)):
        assert setup_py["toolkit_of"](compiler) == str(tmp_path / "toolkit")


def test_default_architectures_are_those_that_the_compiler_knows(setup_py, nvcc):
    assert setup_py["default_archs"](nvcc) == "7.5;8.0;9.0+PTX"


CASES = {  # FORCE_CUDA, CUDA_HOME named, GPU in sight, architectures asked for, and built for
    "nothing": ("", False, False, "", None),
    "gpu": ("", False, True, "", ""),
    "forced": ("1", False, False, "", "7.5;8.0;9.0+PTX"),
    "named": ("", True, False, "", "7.5;8.0;9.0+PTX"),
    "named, forbidden": ("0", True, True, "", None),
    "gpu, forbidden": ("0", False, True, "", None),
    "architecture": ("1", True, False, "8.6", "8.6"),
    "gpu, architecture": ("", False, True, "8.0", "8.0"),
}


@pytest.mark.parametrize("force, named, gpu, wanted, expected", CASES.values(), ids=CASES)
def test_when_and_for_what_it_is_built(
    setup_py, nvcc, monkeypatch, force, named, gpu, wanted, expected
):
    toolkit = Path(nvcc).parent.parent
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("PATH", f"{toolkit / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FORCE_CUDA", force)
    monkeypatch.setenv("CUDA_HOME", str(toolkit) if named else "")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert setup_py["find_cuda"]() == (expected is not None)
    if expected is not None:
        assert os.environ["CUDA_HOME"] == str(toolkit)
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == expected


@pytest.mark.parametrize("version, obstacle", [("13.0", "no nvcc in /none/bin"), (None, "without")])
def test_what_cannot_be_built_is_said(setup_py, monkeypatch, capsys, version, obstacle):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setenv("CUDA_HOME", "/none")
    assert not setup_py["find_cuda"]()
    assert re.search(f"{obstacle}.*CUDA kernels are left out", capsys.readouterr().err)
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=f"FORCE_CUDA=1 asks for the CUDA kernels, .*{obstacle}"):
        setup_py["find_cuda"]()


needs_nvcc = pytest.mark.skipif(
    not shutil.which("nvcc"), reason="needs nvcc, the CUDA compiler, on the PATH"
)


def device_code(setup_py, folder, name, arch, kind):
    """A file's kernels, compiled as setup.py would."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    out = folder / f"{name}.{arch}.{kind}"
    headers = [f"-I{path}" for path in include_paths()]
    flags = [*setup_py["NVCC_FLAGS"], *COMMON_NVCC_FLAGS, "-std=c++20", f"-arch={arch}"]
    source = ROOT / f"csrc/cuda/{name}.cu"
    command = ["nvcc", *flags, *headers, f"-{kind}", source, "-o", out]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")))
def test_old_devices_get_no_instruction_that_they_lack(setup_py, tmp_path, name):
    """The oldest that PyTorch and the compiler know: 7.0 of CUDA 12, 7.5 of CUDA 13."""
    known = subprocess.check_output(["nvcc", "--list-gpu-arch"], text=True).split()
    numbers = sorted(int(arch.removeprefix("compute_")) for arch in known)
    oldest = next(number for number in numbers if number >= 70)
    assert oldest < 80
    code = device_code(setup_py, tmp_path, name, f"compute_{oldest}", "ptx")
    assert ".entry" in code.read_text()
    assert not re.findall(r"ldmatrix|cp\.async|mma\.sync", code.read_text())
    ptx = code.rename(tmp_path / "kernels.ptx")
    command = ["nvcc", f"-arch=sm_{oldest}", "-cubin", ptx, "-o", tmp_path / "kernels.cubin"]
    subprocess.run(command, check=True)


def machine_code(binary):
    """The instructions' names of each kernel."""
    from torch.utils.cpp_extension import CUDA_HOME

    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=f"{CUDA_HOME}/bin")
    if tool is None:  # Triton has it, too
        triton = pytest.importorskip("triton")
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not os.access(tool, os.X_OK):
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton")
    text = subprocess.check_output([tool, "-sass", binary], text=True)
    parts = re.split(r"^\s*Function : (\w+)", text, flags=re.MULTILINE)[1:]
    instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z]\S*)"
    return {
        name: re.findall(instruction, code, re.MULTILINE)
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_copies_go_on_while_the_value_kernel_reads(setup_py, tmp_path, arch):
    """It waits for its tile after all logits and normalisers are under way, not before; of these
    it reads both numbers at once, once for each of two pixels in each of ten rows."""
    kernels = machine_code(device_code(setup_py, tmp_path, "attention_k7_matrix", arch, "cubin"))
    values = [code for name, code in kernels.items() if "value_kernel" in name]
    assert len(values) == 2  # in both types
    for code in values:
        reads = [i for i, name in enumerate(code) if re.match(r"LDG\.", name)]
        assert max(reads) < code.index("LDGDEPBAR")
        assert [code[i] for i in reads].count("LDG.E.64") == 2 * 10


PROBE = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
for name in (
    "elsa::attention", "elsa::attention_backward",
    "elsa::grouped_conv", "elsa::grouped_conv_backward",
):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
assert torch.ops.elsa.cuda_architectures() == "800"
assert not torch.cuda.is_initialized()
"""


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch that is built with CUDA")
def test_kernels_compile_link_and_register(tmp_path):
    """For one architecture, without a GPU, and with a toolkit that is found by itself."""
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("elsa_core", "elsa_d2", "elsa_mm"):
        (tmp_path / name).mkdir()
    for name in ("__init__.py", "_range.py"):
        shutil.copy(ROOT / "elsa_core" / name, tmp_path / "elsa_core")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("cpu"))
    unwanted = ("CUDA_HOME", "CUDA_PATH", "ELSA_BUILD_EXTENSION")
    environment = {name: text for name, text in os.environ.items() if name not in unwanted}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0", "MAX_JOBS": "2"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "built"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    binary = tmp_path / "built" / "elsa_core" / "_C.so"
    assert b".nv_fatbin" in binary.read_bytes()
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", binary], text=True)
    assert not [line for line in symbols.splitlines() if line.split()[-1].startswith(("Py", "_Py"))]
    # What libtorch_cuda.so has, so that the file loads with a PyTorch without CUDA, too.
    of_cuda = re.findall(r"(\w) (\w*torch_c10_cuda_\w+|\w*_cuda_stream)$", symbols, re.MULTILINE)
    assert len(of_cuda) == 3 and {kind for kind, _ in of_cuda} == {"w"}, of_cuda
    done = subprocess.run(
        [sys.executable, "-c", PROBE, binary], cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
