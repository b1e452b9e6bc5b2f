"""Report on the installation and check it: ``elsa doctor`` or ``python -m elsa_core.doctor``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from ._extension import binaries
from ._grouped_conv import serves_device
from ._range import PYTHON, TORCH_WITH_EXTENSION, dotted, numbers, python_obstacle
from .backends import NAMES, backend_of, backends_of, has_kernels, use_backend
from .frameworks import Report, check_frameworks
from .operator import has_extension
from .runtime.errors import one_line
from .runtime.packages import DISTRIBUTIONS, is_missing
from .runtime.quiet import quiet_frameworks
from .self_check import (
    BACKBONE_TOLERANCE,
    TOLERANCE,
    check_backbones,
    check_convolution,
    check_operator,
)

FOLDER = Path(__file__).parent
OTHER = "set ELSA_BACKEND to another one of cuda, triton and torch to continue"
# Optional modules and their purpose.
OPTIONAL = {
    "pictures, INPUT.RESIZE_BACKEND cv2": ("cv2",),
    "COCO": ("pycocotools",),
    "Cityscapes": ("cityscapesscripts",),
    "tools/prepare_data.py": ("PIL", "tqdm"),
    "tools/make_digits.py": ("skimage", "sklearn"),
    "analyze filters": ("matplotlib",),
    "ONNX": ("onnx", "onnxscript", "onnxruntime"),
}


def _kernels(device_type: str) -> str:
    """Return the targets of the operator's compiled kernels for "cpu" or "cuda"."""
    if not has_kernels(device_type):
        instead = "plain PyTorch" if device_type == "cpu" or is_missing("triton") else "Triton"
        return f"none, {instead} instead"
    if device_type == "cpu":
        return torch.ops.elsa.cpu_capability()
    names = torch.ops.elsa.cuda_architectures().split(",")  # such as 800, 1200
    return f"for compute capability {', '.join(f'{name[:-2]}.{name[-2]}' for name in names)}"


def _extension() -> str:
    if not has_extension:
        old = numbers(torch.__version__) < TORCH_WITH_EXTENSION
        since = f"it needs PyTorch {dotted(TORCH_WITH_EXTENSION)}"
        return f"none, {since if old else 'it was not compiled'}"
    file = binaries()[0]
    return str(file) if file.parent == FOLDER else f"{file}, of another copy of elsa_core"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_device(device: torch.device) -> str:
    """Return the name and size of a device in a few words."""
    if device.type == "cpu":
        return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{torch.cuda.get_device_name(device)}, sm_{capability}"


def examine(frameworks: bool = True) -> Report:
    """Return the doctor's report; its ``faults`` are empty if the installation is right.

    Args:
        frameworks: also import and try the installed frameworks.
    """
    report = Report()
    report.lines = [
        f"elsa_core {__version__} in {FOLDER}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda or 'none'}",
        f"extension: {_extension()}",
        f"CPU kernels: {_kernels('cpu')}",
        f"CUDA kernels: {_kernels('cuda')}",
        f"matrix products on the CPU: oneDNN {_yes(torch.backends.mkldnn.is_available())}, "
        f"MKL {_yes(torch.backends.mkl.is_available())}",
    ]
    _check_versions(report)
    for name in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        _check_device(report, torch.device(name))
    if frameworks:
        check_frameworks(report)
    if missing := list(_missing()):
        report.lines.append(f"optional, not installed: {', '.join(missing)}")
    return report


def _missing() -> Iterator[str]:
    for purpose, modules in OPTIONAL.items():
        if absent := [DISTRIBUTIONS[module] for module in modules if is_missing(module)]:
            yield f"{' '.join(absent)} ({purpose})"


def _check_versions(report: Report) -> None:
    if python_obstacle(sys.version_info[:2]):
        ends = " to ".join(map(dotted, PYTHON))
        report.faults.append(f"Python is outside the range {ends} that is tested: use one in it")
    try:
        metadata.version("UNKNOWN")
    except metadata.PackageNotFoundError:
        return
    report.faults.append(
        "an old setuptools has installed this package as UNKNOWN, without its Python files: run "
        "pip uninstall -y UNKNOWN; pip install 'setuptools>=64,<81' wheel, and install it again"
    )


def _check_device(report: Report, device: torch.device) -> None:
    chosen = backend_of(device)
    report.lines.append(f"{device}: {describe_device(device)}; operator by {chosen}")
    for name in sorted(backends_of(device), key=lambda name: name != chosen):
        with use_backend(name if name in NAMES else None):
            try:
                _check_backend(report, device, name)
            except Exception as error:  # any, as of compilers and drivers
                report.faults.append(f"{name} on {device} fails with {one_line(error)!r}: {OTHER}")
    if serves_device(device):
        _check_convolution(report, device)


def _check_backend(report: Report, device: torch.device, name: str) -> None:
    errors = {
        dtype: max(max(check_operator(device, dtype, multiplied)) for multiplied in (False, True))
        for dtype in TOLERANCE
    }
    right = all(error <= TOLERANCE[dtype] for dtype, error in errors.items())
    backbones = check_backbones(device)
    whole = backbones <= BACKBONE_TOLERANCE
    report.lines.append(
        f"self-check {device} by {name}: operator and gradients {'right' if right else 'WRONG'} "
        f"(relative errors: {_figures(errors)}), small backbones {'right' if whole else 'WRONG'} "
        f"({backbones:.0e})"
    )
    if not right or not whole:
        report.faults.append(
            f"results of {name} on {device} are wrong: report it with these lines, and {OTHER}"
        )


def _check_convolution(report: Report, device: torch.device) -> None:
    what = f"the grouped convolution on {device}"
    instead = "set ELSA_CONVOLUTION=torch to continue"
    dtypes = (torch.float16, torch.bfloat16)
    try:
        errors = {dtype: check_convolution(device, dtype) for dtype in dtypes}
    except Exception as error:
        report.faults.append(f"{what} fails with {one_line(error)!r}: {instead}")
        return
    right = all(error <= TOLERANCE[dtype] for dtype, error in errors.items())
    report.lines.append(
        f"self-check {device}: grouped convolution and gradients {'right' if right else 'WRONG'} "
        f"(relative errors: {_figures(errors)})"
    )
    if not right:
        report.faults.append(
            f"results of {what} are wrong: report it with these lines, and {instead}"
        )


def _figures(errors: dict[torch.dtype, float]) -> str:
    return ", ".join(f"{str(t).removeprefix('torch.')} {e:.0e}" for t, e in errors.items())


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def main(arguments: Sequence[str] | None = None, prog: str = "python -m elsa_core.doctor") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Says what this installation has, checks the operator, an ELSA-Swin and an "
        "ELSA-VOLO on every device, and builds and runs both in every framework that is installed. "
        "Exit status: 0 if all is right, 1 if something is wrong.",
    )
    parser.add_argument(
        "--core", action="store_true", help="leave the frameworks out, which takes seconds less"
    )
    options = parser.parse_args(arguments)
    with quiet_frameworks():
        report = examine(frameworks=not options.core)
    print("\n".join([*report.lines, *(f"WRONG: {fault}" for fault in report.faults)]))
    return 1 if report.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
