"""Step "load": the extension, built beforehand or here, and what is in it."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from .common import DEVICE, REHEARSAL, ROOT, seconds_left, step_arguments

QUESTION = """
import torch, elsa_core
from elsa_core import backends
from elsa_core._extension import binaries
keys = [torch._C._dispatch_has_kernel_for_dispatch_key(name, KEY)
        for name in ("elsa::attention", "elsa::attention_backward")]
file = binaries()[0] if binaries() else None
if file is None:
    print("elsa_core has no compiled extension")
elif not hasattr(torch.ops.elsa, "cuda_architectures"):
    print(f"{file.name} has no CUDA kernels")
elif not all(keys):
    print(f"{file.name} registers no kernels for {KEY}")
else:
    found = ", ".join(backends.backends_of(torch.device(KEY.lower())))
    built = torch.ops.elsa.cuda_architectures() or "the emulation"
    print(f"right: {file.name} for {built}; back ends {found}")
"""


def ask() -> str:
    """Returns "right: ..." or what is wrong, from a process of its own."""
    question = QUESTION.replace("KEY", repr(DEVICE.type.upper()))
    command = [sys.executable, "-W", "ignore", "-c", question]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.strip() or done.stderr.strip() or "no answer").splitlines()[-1][:400]


def build() -> str:
    """Builds the extension in the repository; returns the end of what that says."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(DEVICE)))
    environment = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"]
    command += ["--force"]
    limit = max(1.0, seconds_left() - 10)
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )
    print(done.stdout[-6000:], flush=True)
    return f"status {done.returncode}"


def main() -> int:
    rows, _, _ = step_arguments("load")
    answer = ask()
    rows.add("extension", answer=answer, wrong=int(not answer.startswith("right")))
    if not answer.startswith("right") and not REHEARSAL:
        with rows.case("build") as row:
            row["answer"] = build()
        answer = ask()
        rows.add("extension", answer=answer, wrong=int(not answer.startswith("right")))
    return int(not answer.startswith("right"))


if __name__ == "__main__":
    raise SystemExit(main())
