"""Step "facts": the device, the versions, and a copy and a product as ceilings of speed.

The copy changes the sign, which a kernel does: a plain one would be CUDA's own node in a graph.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib import metadata

import torch

from .common import DEVICE, REHEARSAL, ROOT, step_arguments, time_us

PACKAGES = ("triton", "timm", "pytest", "hypothesis", "pytest-xdist", "numpy")
TOOLS = {"nvcc": "--version", "ncu": "--version", "compute-sanitizer": "--version"}
COPY_BYTES = 2**14 if REHEARSAL else 2**31
SIDE = 64 if REHEARSAL else 8192


def said(*command: str) -> str:
    """Returns the last line of what a command says, or why it says nothing."""
    if not shutil.which(command[0]):
        return "not on the PATH"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[-1][:200] if lines else f"status {done.returncode}"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    rows, folder, _ = step_arguments("facts")
    machine: dict[str, object] = {
        "rehearsal": REHEARSAL,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": said("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        **{package: version(package) for package in PACKAGES},
        **{tool: said(tool, option) for tool, option in TOOLS.items()},
    }
    path = folder / "machine.json"

    def write() -> None:
        path.write_text(json.dumps(machine, indent=2) + "\n")

    write()
    if REHEARSAL:
        machine["device"] = "none: a rehearsal on the CPU"
    else:
        found = torch.cuda.get_device_properties(DEVICE)
        machine["device"] = found.name
        machine["capability"] = f"{found.major}.{found.minor}"
        machine["multiprocessors"] = found.multi_processor_count
        machine["memory_gib"] = round(found.total_memory / 2**30, 1)
        machine["cudnn"] = torch.backends.cudnn.version()
        query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        machine["nvidia_smi"] = said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    write()
    ceilings: dict[str, float] = {}
    with rows.case("copy") as row:
        source = torch.randn(COPY_BYTES // 2, device=DEVICE, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        row["us"] = time_us(lambda: torch.neg(source, out=target))
        row["gb_per_s"] = ceilings["copy_gb_per_s"] = 2 * COPY_BYTES / row["us"] / 1e3
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with rows.case(f"product, {name}") as row:
            square = torch.randn(SIDE, SIDE, device=DEVICE, dtype=dtype)
            row["us"] = time_us(lambda square=square: square @ square)
            tflops = 2 * SIDE**3 / row["us"] / 1e6
            row["tflops"] = ceilings[f"product_{name}_tflops"] = tflops
    machine["ceilings"] = {name: round(value, 1) for name, value in ceilings.items()}
    write()
    rows.add("machine", device=machine["device"], torch=torch.__version__)


if __name__ == "__main__":
    main()
