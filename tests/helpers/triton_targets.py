"""Compiles Triton kernels for devices that are not there, as their own launches would.

``python tests/helpers/triton_targets.py`` shows what the kernels of the published models take.
"""

import os
import re
import subprocess
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from elsa_core.triton import operator

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Resources(NamedTuple):
    """Registers and bytes spilled of a thread, and bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int


class _Driver:
    """What a launch asks for before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class _Compiler(triton.runtime.JITFunction):
    """A kernel whose launches only compile it, into ``compiled``."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        def launch(**arguments):
            self.compiled[self.kernel.__name__] = self.kernel.warmup(grid=grid, **arguments)

        return launch


@contextmanager
def compiling_for(target):
    """Within it, launches of the operator's kernels compile them into the dict that it yields."""
    compiled = {}
    kernels = dict(operator.KERNELS)
    fakes = {name: _Compiler(kernel, compiled) for name, kernel in kernels.items()}
    driver = _Driver(TARGETS[target])
    with (
        mock.patch.dict(operator.KERNELS, fakes),
        mock.patch.object(triton.runtime.driver, "_active", driver),
    ):
        yield compiled
    for kernel in kernels.values():  # what is compiled for another device must not be run
        kernel.device_caches.clear()


def compile_all(target, dtype, kernel_size=7, depth=32, ghosts=("add",), heads=3):
    """Compile forward and backward pass; {kernel: compiled}."""
    shape, filters = (2, 50, 76), (heads * depth, kernel_size, kernel_size)
    value = torch.zeros(*shape, heads * depth, dtype=dtype)
    logits = torch.zeros(*shape, heads * kernel_size**2, dtype=dtype)
    add, mul = (torch.zeros(filters, dtype=dtype) if n in ghosts else None for n in ("add", "mul"))
    with compiling_for(target) as compiled:
        operator.attention(value, logits, add, mul, kernel_size, 1)
        operator.attention_backward(value, value, logits, add, mul, kernel_size, 1)
    return compiled


def resources(kernel):
    """What a compiled kernel takes, by its assembler."""
    shared = kernel.metadata.shared
    if kernel.metadata.target.backend == "hip":
        text = kernel.asm["amdgcn"]
        counts = {key: int(count) for key, count in re.findall(r"\.(\w+_count): +(\d+)", text)}
        spilled = 4 * (counts["vgpr_spill_count"] + counts["sgpr_spill_count"])
        return Resources(counts["vgpr_count"], spilled, shared)
    target = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
    ptxas = get_ptxas(kernel.metadata.target.arch).path
    command = [ptxas, "-v", "--gpu-name", target, "-o", os.devnull, "/dev/stdin"]
    done = subprocess.run(
        command, input=kernel.asm["ptx"], text=True, check=True, capture_output=True
    )
    said = done.stdout + done.stderr
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", said))
    return Resources(int(re.search(r"Used (\d+) registers", said)[1]), spilled, shared)


def main():
    print(f"{'target':8}{'type':10}{'kernel':16}{'registers':>10}{'spilled':>9}{'shared':>8}")
    for target in TARGETS:
        for dtype in operator.DTYPES:
            for name, kernel in compile_all(target, dtype).items():
                figures = "{:10}{:9}{:8}".format(*resources(kernel))
                print(f"{target:8}{str(dtype)[6:]:10}{name:16}{figures}")


if __name__ == "__main__":
    main()
