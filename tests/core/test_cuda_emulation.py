"""The CUDA kernels, compiled for the CPU by cuda_emulation/ and held to the tests of a GPU.

Shared memory begins as NaN and ends where the launch says; the threads of a block run in three
orders, one of which tells where a barrier is missing. It says nothing about speed, nor about how a
GPU rounds its fast exponential.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TESTS = [ROOT / f"tests/core/test_{name}.py" for name in ("cuda_operator", "operator_properties")]


QUESTIONS = """
import ctypes, torch, elsa_core
emulation = ctypes.CDLL(elsa_core.__path__[0] + "/_C.so")

# Kernels for any size ask nothing; on a device of their own.
emulation.emulation_set_device(2)
for kernel, filters, dilation, asks in ((7, 2, 1, 0), (5, 2, 2, 0), (5, 2, 1, 1), (7, 1, 1, 1)):
    ghosts = [torch.randn(32, kernel, kernel)] * filters + [None] * (2 - filters)
    before = emulation.emulation_questions()
    logits = torch.randn(1, 2, 3, kernel**2)
    torch.ops.elsa.attention(torch.randn(1, 2, 3, 32), logits, *ghosts, kernel, dilation)
    assert (emulation.emulation_questions() > before) == asks, (kernel, filters, dilation)

def run():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        value, logits = torch.randn(1, 2, 3, 32, dtype=dtype), torch.randn(1, 2, 3, 49, dtype=dtype)
        problem = value, logits, torch.randn(32, 7, 7, dtype=dtype), None, 7, 1
        torch.ops.elsa.attention_backward(torch.ops.elsa.attention(*problem), *problem)
    return emulation.emulation_questions()

counts = [emulation.emulation_questions()]
for device in (0, 1, 0):
    emulation.emulation_set_device(device)
    counts += [run(), run()]
print(*counts)
"""


def test_the_runtime_is_asked_once_for_each_device(emulation):
    """For what a device and its kernels may; a launch on a device that has not been asked fails."""
    command = [sys.executable, "-c", QUESTIONS]
    environment = {**os.environ, "PYTHONPATH": str(emulation)}
    done = subprocess.run(command, cwd=emulation, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = [int(word) for word in done.stdout.split()]
    steps = [after - before for before, after in zip(counts[:-1], counts[1:], strict=True)]
    assert steps[0] > 0 and steps == [steps[0], 0, steps[0], 0, 0, 0]


# ELSA_EMULATION_ALL=1 leaves nothing out, and takes minutes.
ALL = "ELSA_EMULATION_ALL" in os.environ
LOW = "low and (tile and (5 or 7) or ghost or extreme)"
FEW = "published and tile or agrees and odd and both and float32 and not 13"
SOME = f"{FEW} or {LOW} or published and (none-7 or add-7 or both-5) or low and (5 or 7) or nan"
SOME += " or strided and 8 or frozen or nothing or refuses"
SOME += " or (gradcheck or opcheck) and both-5"
OLD = f"{LOW} or nan or properties and (published or extreme)"


@pytest.mark.parametrize(
    "order, shared, capability, wanted, least",
    [
        ("0", "232448", "9.0", f"{SOME} or properties and not narrower", 110),
        ("1", "232448", "9.0", FEW, 14),  # from the last thread to the first
        ("2", "232448", "9.0", LOW, 14),  # shuffled
        ("2", "49152", "9.0", FEW, 14),  # on a device with little shared memory
        ("3", "65536", "7.5", OLD, 16),  # on one without these tensor cores
    ],
    ids=["in order", "in reverse", "shuffled", "little memory", "old"],
)
def test_kernels_pass_the_tests_of_a_gpu(emulation, order, shared, capability, wanted, least):
    """And have the operator's properties."""
    assert (
        passed(emulation, TESTS, "not narrower" if ALL else wanted, order, capability, shared)
        > least
    )


@pytest.mark.parametrize(
    "order, capability, wanted, least",
    [
        ("0", "9.0", "not old", 60),
        ("1", "9.0", "agrees or parts", 32),
        ("2", "9.0", "agrees", 31),
        ("0", "7.5", "old", 0),
    ],
    ids=["in order", "in reverse", "shuffled", "old"],
)
def test_grouped_convolution_passes_the_tests_of_a_gpu(emulation, order, capability, wanted, least):
    test = ROOT / "tests/core/test_cuda_grouped_conv.py"
    assert passed(emulation, [test], wanted, order, capability) > least


def passed(folder, tests, wanted, order, capability, shared="232448"):
    """How many of the wanted tests there are, all of which must pass."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ELSA_EMULATION": "1"}
    environment |= {"ELSA_EMULATION_ORDER": order, "ELSA_EMULATION_SHARED": shared}
    environment["ELSA_EMULATION_CAPABILITY"] = capability
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-c", ROOT / "pyproject.toml", *tests, "-k", wanted]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[:1000]
    return int(re.search(r"(\d+) passed", done.stdout)[1])
