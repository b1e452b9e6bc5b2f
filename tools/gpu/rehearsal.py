"""What takes the place of a device in a rehearsal: the emulated kernels and parts of torch.cuda."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import ROOT

HELPERS = ROOT / "tests/helpers"


def build(folder: Path) -> None:
    """Makes the folder's elsa_core one whose kernels for the CPU are those for CUDA."""
    if list(folder.glob("elsa_core/_C*.so")):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sys.path.insert(0, str(HELPERS))
    import emulated_kernels

    emulated_kernels.build(folder)


def compile_instructions(source: Path, program: Path) -> None:
    """Compiles tools/gpu/instructions.cu with the emulation's header in the place of CUDA's."""
    sys.path.insert(0, str(HELPERS))
    import emulated_kernels

    emulation = emulated_kernels.EMULATION / "emulation.cpp"
    objects = emulated_kernels.compile_objects(program.parent, [emulation, source])
    emulated_kernels.link(program, objects)


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other.seconds - self.seconds)


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        pass


class _Graph:
    """Runs nothing again: a rehearsal's times mean nothing."""

    def replay(self) -> None:
        time.sleep(1e-4)


def install_stand_ins() -> None:
    """Replaces what the steps call of torch.cuda; this process uses no device."""
    import torch

    @contextlib.contextmanager
    def nothing(*arguments: Any, **options: Any) -> Iterator[None]:
        yield

    cuda: Any = torch.cuda
    cuda.Event, cuda.Stream, cuda.CUDAGraph = _Event, _Stream, _Graph
    cuda.stream = cuda.graph = nothing
    cuda.current_stream = _Stream
    cuda.synchronize = lambda *_: None
    cuda.empty_cache = lambda: None
    cuda.reset_peak_memory_stats = lambda *_: None
    cuda.max_memory_allocated = lambda *_: 2**20


def environment(place: Path) -> dict[str, str]:
    """Returns the environment of a rehearsal's steps, with elsa_core from ``place``."""
    stand_ins = Path(__file__).parent / "stand_ins"
    paths = (place, ROOT, ROOT / "tools")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}",
        "ELSA_GPU_CHECK_REHEARSAL": "1",
        "ELSA_EMULATION": "1",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
