"""What this installation has, in ten lines, with a self-check: ``python -m elsa_core.doctor``."""

from __future__ import annotations

import argparse
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from . import ELSASwin, __version__, elsa_attention, elsa_attention_reference
from ._extension import binaries
from .operator import has_extension

FOLDER = Path(__file__).parent
# Distributions under which a framework is published; the first one that is there is shown.
FRAMEWORKS = {
    "detectron2": ("detectron2", "sal-detectron2"),
    "mmengine": ("mmengine", "onedl-mmengine"),
    "mmcv": ("mmcv", "mmcv-lite", "onedl-mmcv"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
}
# Largest error, relative to the largest number, that the self-check accepts.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# Of a backbone in float32: GPUs convolve in TF32 unless told otherwise.
BACKBONE_TOLERANCE = 1e-2


def self_check(device: torch.device, dtype: torch.dtype, multiplied: bool) -> tuple[float, float]:
    """Errors of the operator's result and of its gradients, each relative to the largest number.

    Compared with the reference in double precision on the CPU, at a shape that has borders, two
    heads of 32 channels and an incomplete vector.

    Args:
        multiplied: with both ghost filters, for which CUDA devices have general kernels; else with
            the additive one alone as in the published models, for which they have fast ones.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).double()

    shape, taps = (2, 9, 19), 7 * 7
    exact = [draw(*shape, 64), draw(*shape, 2 * taps), draw(64, 7, 7)]
    if multiplied:
        exact.append(draw(64, 7, 7))
    ours = [tensor.to(device, dtype).requires_grad_() for tensor in exact]
    exact = [tensor.requires_grad_() for tensor in exact]
    grad = draw(*shape, 64)
    out = elsa_attention(*ours, kernel_size=7)
    expected = elsa_attention_reference(*exact, kernel_size=7)
    grads = torch.autograd.grad(out, ours, grad.to(device, dtype))
    expected_grads = torch.autograd.grad(expected, exact, grad)
    backward = max(map(_error, grads, expected_grads))
    return _error(out.detach(), expected.detach()), backward


def check_backbone(device: torch.device) -> float:
    """Largest error, relative to the largest number, of a small `ELSASwin` in float32.

    Compared with itself in double precision on the CPU, from a state dict that it has loaded.
    """
    arch = dict(embed_dim=32, depths=(1, 1, 1), num_heads=(1, 2, 4), group_width=8)
    exact, ours = (ELSASwin(arch, out_indices=(0, 1, 2)).eval() for _ in range(2))
    ours.load_state_dict(exact.state_dict())
    image = torch.randn(1, 3, 61, 83, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours.to(device)(image.to(device)), exact.double()(image.double())
    return max(map(_error, found, expected))


def _error(result: Tensor, expected: Tensor) -> float:
    # As infinity, NaN is the largest of several errors.
    difference = (result.cpu().double() - expected).abs().nan_to_num(nan=math.inf).max()
    return (difference / expected.abs().max()).item()


def _version(distributions: Sequence[str]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _kernels(key: str) -> str:
    """What the operator's compiled kernels for a dispatch key are compiled for."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("elsa::attention", key):
        return "none, plain PyTorch instead"
    if key == "CPU":
        return torch.ops.elsa.cpu_capability()
    names = torch.ops.elsa.cuda_architectures().split(",")  # such as 800, 1200
    return f"for compute capability {', '.join(f'{name[:-2]}.{name[-2]}' for name in names)}"


def _extension() -> str:
    if not has_extension:
        return "none, it was not compiled"
    file = binaries()[0]
    return str(file) if file.parent == FOLDER else f"{file}, of another copy of elsa_core"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _devices() -> list[torch.device]:
    gpus = range(torch.cuda.device_count())
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]


def describe_device(device: torch.device) -> str:
    """Name and size of a device, in a few words."""
    if device.type == "cpu":
        return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{torch.cuda.get_device_name(device)}, sm_{capability}"


def report() -> tuple[list[str], bool]:
    """The lines, and whether every self-check passed."""
    found = [f"{name} {v}" for name, names in FRAMEWORKS.items() if (v := _version(names))]
    lines = [
        f"elsa_core {__version__} in {FOLDER}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda or 'none'}",
        f"frameworks: {', '.join(found) or 'none, elsa_core needs none'}",
        f"extension: {_extension()}",
        f"CPU kernels: {_kernels('CPU')}",
        f"CUDA kernels: {_kernels('CUDA')}",
        f"matrix products on the CPU: oneDNN {_yes(torch.backends.mkldnn.is_available())}, "
        f"MKL {_yes(torch.backends.mkl.is_available())}",
    ]
    healthy = True
    for device in _devices():
        lines.append(f"{device}: {describe_device(device)}")
        errors = {
            dtype: max(max(self_check(device, dtype, multiplied)) for multiplied in (False, True))
            for dtype in TOLERANCE
        }
        right = all(error <= TOLERANCE[dtype] for dtype, error in errors.items())
        backbone = check_backbone(device)
        whole = backbone <= BACKBONE_TOLERANCE
        healthy &= right and whole
        figures = ", ".join(f"{str(t).removeprefix('torch.')} {e:.0e}" for t, e in errors.items())
        lines.append(
            f"self-check {device}: operator and gradients {'right' if right else 'WRONG'} "
            f"(relative errors: {figures}), a small backbone {'right' if whole else 'WRONG'} "
            f"({backbone:.0e})"
        )
    return lines, healthy


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m elsa_core.doctor",
        description="Say what this installation of elsa_core has and check its operator against "
        "the reference on every device. Exit status: 0 if all is right, 1 if a check fails.",
    )
    parser.parse_args(arguments)
    lines, healthy = report()
    print("\n".join(lines))
    return 0 if healthy else 1


if __name__ == "__main__":
    raise SystemExit(main())
