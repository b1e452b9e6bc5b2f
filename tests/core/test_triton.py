"""Triton's kernels: by the tests of a GPU in its interpreter, and compiled for other devices."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
TESTS = [Path(__file__).with_name(f"test_{name}.py") for name in ("cuda_operator", "backends")]
# ELSA_TRITON_ALL=1 leaves nothing out, and takes a quarter of an hour. What no kernel of Triton
# computes is left out: float64, and what CUDA's kernels alone refuse.
ALL = "ELSA_TRITON_ALL" in os.environ
OURS = "not float64 and not refuses"
SOME = (
    "(agrees and (odd and (both and (3-2 or 7-1) or none and 3-1) or batch) and not 13"
    " or published and pixel and (add-7 or both-5) or rounds_once and pixel and (5 or 7)"
    " or any_ghost and both-5-torch.float16"
    " or mean_nothing and 3 and float16 and (4-1 or 4-5) or opcheck and both-3"
    " or extreme and 12 or nan and 12 or these or interpreter)"
)


def run(environment, wanted):
    """The number of tests that passed; all of those that are wanted."""
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", *TESTS, "-k", wanted]
    environment = {**os.environ, "ELSA_BACKEND": "triton", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@pytest.mark.slow
def test_kernels_pass_the_tests_of_a_gpu():
    wanted = OURS if ALL else f"{OURS} and {SOME}"
    assert run({"TRITON_INTERPRET": "1"}, wanted) > 35


@pytest.mark.needs_cuda
def test_kernels_pass_the_tests_on_a_gpu():
    assert run({"TRITON_INTERPRET": "0"}, OURS) > 200


CASES = {  # kernel size, channels a head, ghost filters
    "published": (7, 32, ("add",)),
    "volo": (5, 32, ("add", "mul")),
    "both filters": (7, 32, ("add", "mul")),
    "no filter": (3, 24, ()),
    "largest": (13, 64, ("add", "mul")),
    "one channel": (5, 1, ("add",)),
    "wide heads": (7, 256, ("add",)),
}


MODELS = ("published", "volo")
TYPES = [(name, dtype) for name in MODELS for dtype in ("float32", "float16", "bfloat16")]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name, dtype", [*TYPES, *((name, "bfloat16") for name in [*CASES][2:])])
def test_kernels_compile_for_other_devices(name, dtype, target, record_property):
    """Those of the models without a spilled register."""
    from triton_targets import compile_all, resources

    compiled = compile_all(target, getattr(torch, dtype), *CASES[name])
    kernels = ["forward", "logits", "value", *(["ghost"] if CASES[name][2] else [])]
    assert list(compiled) == [f"{kernel}_kernel" for kernel in kernels]
    for kernel, binary in compiled.items():
        taken = resources(binary)
        record_property(kernel, taken._asdict())
        assert taken.shared <= 48 * 1024
        assert name not in MODELS or taken.spilled == 0, (kernel, taken)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["sliced", "sliced at 16", "by columns", "odd address"])
def test_strides_and_addresses_change_no_code(change):
    """Code of their own would have an order of its own in the sums for the ghost filters."""
    from triton_targets import compiling_for

    from elsa_core.triton import operator

    def changed(tensor):
        numbers = tensor.shape[-1]
        if change == "by columns":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if change == "odd address":
            return torch.zeros(tensor.numel() + 1)[1:].view(tensor.shape)
        before = {"sliced": 3, "sliced at 16": 16}[change]
        return F.pad(tensor, (before, -numbers % before))[..., before : before + numbers]

    def compiled(tensors):
        with compiling_for("sm_90") as kernels:
            operator.attention(*tensors, ghost, None, 3, 1)
            operator.attention_backward(tensors[0], *tensors, ghost, None, 3, 1)
        return {name: kernel.hash for name, kernel in kernels.items()}

    maps, ghost = [torch.zeros(2, 3, 5, 64), torch.zeros(2, 3, 5, 18)], torch.zeros(64, 3, 3)
    assert compiled([changed(tensor) for tensor in maps]) == compiled(maps)


@pytest.mark.parametrize("dilation", [2, 50, 2**30 - 1])
def test_programs_are_no_more_than_positions(dilation, monkeypatch):
    from elsa_core.triton import operator

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda **arguments: None

    grids = []
    for name in ("logits", "value"):
        monkeypatch.setitem(operator.KERNELS, name, Kernel())
    value, logits = torch.zeros(2, 50, 3, 8), torch.zeros(2, 50, 3, 2 * 9)
    operator.attention_backward(value, value, logits, None, None, 3, dilation)
    assert max(first * second * third for first, second, third in grids) <= 2 * 50 * 3 * 2


HUGE = {"width": (1, 1, 2**26, 1), "rows": (2**16, 2**15, 1, 1), "channels": (1, 1, 1, 2**22)}


@pytest.mark.parametrize("shape", HUGE.values(), ids=HUGE)
def test_sizes_beyond_32_bits_are_left_to_plain_pytorch(shape):
    from elsa_core.triton import operator

    less = [size // 16 or 1 for size in shape]
    served = [operator._is_served(torch.empty(s, device="meta"), 3) for s in (shape, less)]
    assert served == [False, True]
