"""The kernels of GPUs against the operator's definition: CUDA's, or Triton's by name.

All of it needs a GPU, but for what test_cuda_emulation.py runs in an emulation on the CPU, and
test_triton.py in Triton's interpreter.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import operator_inputs
import pytest
import torch
from operator_inputs import GHOSTS, LOW, SHORT_AXES, value_and_gradients, with_constant_logits

import elsa_core
from elsa_core import backend_of, elsa_attention, elsa_attention_reference
from elsa_core.backends import has_kernels

EMULATED = "ELSA_EMULATION" in os.environ
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if EMULATED or INTERPRETED else "cuda"
needs_cuda = pytest.mark.needs_cuda
pytestmark = [needs_cuda] if DEVICE == "cuda" else []

SHAPES = {
    "published": (1, 9, 19, 64, 2),
    "many channels a head": (1, 6, 5, 70, 1),
    **operator_inputs.SHAPES,
}
PUBLISHED = {  # 32 channels a head, as the published models have
    "one pixel": (1, 1, 1, 32, 1),
    "one tile": (2, 8, 16, 64, 2),
    "a tile and a bit": (1, 9, 17, 96, 3),
    "narrow": (3, 70, 3, 32, 1),
    "wide": (1, 3, 150, 64, 2),
    "stage 1": (2, 50, 76, 96, 3) if DEVICE == "cuda" else (1, 20, 37, 96, 3),
    "stage 3": (1, 14, 14, 384, 12),
    "volo": (2, 28, 28, 256, 8) if DEVICE == "cuda" else (1, 11, 21, 192, 6),
}
# Of any model, ELSA-VOLO, ELSA-Swin.
MODELS = {"3": (3, ("add",)), "5": (5, ("add", "mul")), "7": (7, ("add",))}
of_models = pytest.mark.parametrize("kernel_size, ghosts", MODELS.values(), ids=MODELS)


def make_inputs(shape, kernel_size, ghosts=("add",), dtype=torch.float32, device=DEVICE, seed=0):
    return operator_inputs.make_inputs(shape, kernel_size, ghosts, dtype, device, seed)


def assert_agrees(inputs, kernel_size=7, dilation=1):
    operator_inputs.assert_agrees(inputs, kernel_size, dilation, double=1e-11)


def assert_rounds_once(inputs, kernel_size=7):
    roundings = 2 if INTERPRETED else 1  # Triton's interpreter cuts numbers of bfloat16 off
    operator_inputs.assert_rounds_once(inputs, kernel_size, roundings)


def test_these_kernels_are_tested():
    """And not those of plain PyTorch."""
    if EMULATED:
        assert has_kernels("cuda")
    else:
        wanted = os.environ.get("ELSA_BACKEND", "cuda")
        assert backend_of(torch.device(DEVICE, 0)) == wanted, f"there are no kernels of {wanted}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kernel_size, dilation", [(1, 1), (3, 1), (3, 2), (5, 1), (7, 1), (7, 2), (9, 1), (13, 1)]
)
@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_agrees_with_reference(shape, ghosts, kernel_size, dilation, dtype):
    assert_agrees(make_inputs(shape, kernel_size, ghosts, dtype), kernel_size, dilation)


@pytest.mark.parametrize("kernel_size", [5, 7])
@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=PUBLISHED)
def test_published_shapes_agree_with_reference(shape, ghosts, kernel_size):
    assert_agrees(make_inputs(shape, kernel_size, ghosts), kernel_size)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@of_models
@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=PUBLISHED)
def test_low_precision_rounds_once(shape, kernel_size, ghosts, dtype):
    assert_rounds_once(make_inputs(shape, kernel_size, ghosts, dtype), kernel_size)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kernel_size", [5, 7])
@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
def test_low_precision_with_any_ghost(ghosts, kernel_size, dtype):
    shape = PUBLISHED["a tile and a bit"]
    assert_rounds_once(make_inputs(shape, kernel_size, ghosts, dtype), kernel_size)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("logits", [1e4, -1e4, 0.0])
@of_models
def test_low_precision_with_extreme_logits(kernel_size, ghosts, logits, dtype):
    inputs = make_inputs(PUBLISHED["a tile and a bit"], kernel_size, ghosts, dtype)
    # 64: the next number of bfloat16.
    inputs = with_constant_logits(inputs, kernel_size, logits, 64)
    assert_rounds_once(inputs, kernel_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@of_models
@pytest.mark.parametrize("offset", [0, 3, 8, 16], ids="offset {}".format)
def test_strided_inputs(offset, kernel_size, ghosts, dtype):
    inputs = make_inputs((2, 10, 18, 64, 2), kernel_size, ghosts, dtype)
    operator_inputs.assert_strides_do_not_matter(inputs, kernel_size, offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@of_models
@pytest.mark.parametrize("shape", SHORT_AXES, ids=str)
def test_strides_of_axes_of_length_1_mean_nothing(shape, kernel_size, ghosts, dtype):
    inputs = make_inputs((*shape, 64, 2), kernel_size, ghosts, dtype)
    operator_inputs.assert_strides_of_axes_of_length_1_mean_nothing(inputs, kernel_size)


@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), (3, 2), (5, 1), (7, 1)])
def test_gradcheck(ghosts, kernel_size, dilation):
    inputs = make_inputs((2, 3, 4, 6, 2), kernel_size, ghosts, torch.float64)
    operator_inputs.assert_gradients_are_right(inputs, kernel_size, dilation)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
def test_opcheck(ghosts, kernel_size):
    inputs = make_inputs((1, 2, 3, 64, 2), kernel_size, ghosts)
    operator_inputs.assert_registrations_are_right(inputs, kernel_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kernel_size", [5, 7])
@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
def test_gradients_of_frozen_filters_are_left_out(ghosts, kernel_size, dtype):
    inputs = make_inputs((1, 9, 17, 64, 2), kernel_size, ghosts, dtype)
    backward = torch.ops.elsa.attention_backward
    operator_inputs.assert_frozen_filters_are_left_out(backward, inputs, kernel_size)


@needs_cuda
@pytest.mark.parametrize("kernel_size", [5, 7])
@pytest.mark.parametrize("ghosts", [("add",), ("add", "mul")], ids=["add", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_deterministic(dtype, ghosts, kernel_size):
    inputs = make_inputs((4, 60, 77, 96, 3), kernel_size, ghosts, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [value_and_gradients(elsa_attention, inputs, kernel_size) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@needs_cuda
@of_models
def test_runs_on_the_current_stream(kernel_size, ghosts):
    """Behind a long wait on the current stream the inputs change; other streams would see the old
    ones."""
    inputs = make_inputs((1, 20, 30, 64, 2), kernel_size, ghosts)
    expected = value_and_gradients(elsa_attention, inputs, kernel_size)
    late = [t if t is None else torch.zeros_like(t).requires_grad_() for t in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for to, source in zip(late, inputs, strict=True):
                if to is not None:
                    to.copy_(source)
        results = value_and_gradients(elsa_attention, late, kernel_size)
        assert all(map(torch.equal, results, expected))


@needs_cuda
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_second_device(kernel_size):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = make_inputs((1, 20, 30, 64, 2), kernel_size)
    expected = value_and_gradients(elsa_attention, inputs, kernel_size)
    others = make_inputs((1, 20, 30, 64, 2), kernel_size, device="cuda:1")
    with torch.cuda.device(0):
        results = value_and_gradients(elsa_attention, others, kernel_size)
    for result, reference in zip(results, expected, strict=True):
        assert result.device == torch.device("cuda:1")
        assert torch.equal(result.cpu(), reference.cpu())


@needs_cuda
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_computes_in_its_own_type(dtype):
    inputs = make_inputs((1, 9, 17, 64, 2), 7)
    operator_inputs.assert_autocast_computes_in_its_own_type(inputs, 7, dtype)


def test_compiles_without_graph_break():
    operator_inputs.assert_compiles_without_graph_break(make_inputs((1, 9, 17, 64, 2), 7), 7)


@needs_cuda
@of_models
def test_can_be_captured_in_a_graph(kernel_size, ghosts):
    inputs = make_inputs((1, 9, 17, 64, 2), kernel_size, ghosts)
    inputs = [t if t is None else t.detach() for t in inputs]
    expected = elsa_attention(*inputs, kernel_size=kernel_size)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = elsa_attention(*inputs, kernel_size=kernel_size)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


FIRST_CALL = """
import contextlib, sys
import torch, elsa_core
device = sys.argv[1]
capture = contextlib.nullcontext()
if device == "cuda":
    graph = torch.cuda.CUDAGraph()
    capture = torch.cuda.graph(graph)
half, bfloat16, single = torch.float16, torch.bfloat16, torch.float32
calls = []
for dtype, kernel in ((half, 7), (bfloat16, 7), (single, 7), (single, 5), (half, 5), (single, 3)):
    filters = (64, kernel, kernel)
    sizes = (1, 9, 17, 64), (1, 9, 17, 64), (1, 9, 17, 2 * kernel**2), filters, filters
    *call, mul = (torch.randn(size).to(device, dtype) for size in sizes)
    calls.append((*call, mul if kernel == 5 else None, kernel, 1))

def run():
    attention, backward = torch.ops.elsa.attention, torch.ops.elsa.attention_backward
    return [t for call in calls for t in (attention(*call[1:]), *backward(*call))]

with capture:
    results = run()
if device == "cuda":
    for tensor in results:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
assert len(results) == 30 and all(map(torch.equal, results, run()))
assert all(tensor.abs().sum() > 0 for tensor in results if tensor.numel())
"""


def test_first_call_in_a_process_can_be_captured_in_a_graph():
    """What the kernels ask of the device, and their loading, are no work of a stream."""
    root = str(Path(elsa_core.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [root, os.getenv("PYTHONPATH")]))
    command = [sys.executable, "-c", FIRST_CALL, DEVICE]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@of_models
def test_two_streams_at_once(kernel_size, ghosts, dtype):
    """Each thread fills a stream of its own, which waits first, so that both have work at once."""
    shape, rounds = ((1, 9, 17, 64, 2), 2) if EMULATED else ((2, 50, 76, 96, 3), 20)
    attention, backward = torch.ops.elsa.attention, torch.ops.elsa.attention_backward

    def run(problem):
        return [attention(*problem), *backward(problem[0].flip(1), *problem)]

    def run_in_a_stream(problem):
        if EMULATED:
            return [run(problem) for _ in range(rounds)]
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)
            return [run(problem) for _ in range(rounds)]

    problems = []
    for seed in range(2):
        inputs = make_inputs(shape, kernel_size, ghosts, dtype, seed=seed)
        problems.append([*(t if t is None else t.detach() for t in inputs), kernel_size, 1])
    expected = [run(problem) for problem in problems]
    if not EMULATED:
        torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(run_in_a_stream, problems))
    if not EMULATED:
        torch.cuda.synchronize()
    assert not torch.equal(expected[0][0], expected[1][0])
    for runs, reference in zip(results, expected, strict=True):
        assert len(runs) == rounds
        assert all(all(map(torch.equal, tensors, reference)) for tensors in runs)


@needs_cuda
@pytest.mark.parametrize("ghosts", [("add",), ("add", "mul")], ids=["add", "both"])
def test_memory_stays_near_that_of_inputs_and_results(ghosts):
    """Nothing of the size C * K * K * H * W, 49 times the values, is ever held."""
    inputs = make_inputs((2, 100, 152, 96, 3), 7, ghosts)
    needed = sum(t.nbytes for t in inputs if t is not None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = elsa_attention(*inputs, kernel_size=7)
    torch.autograd.grad(out.sum(), [t for t in inputs if t is not None])
    peak = torch.cuda.max_memory_allocated() - before
    sums_of_filters = 2 * 256 * inputs[2].nbytes
    assert peak <= 1.5 * needed + 2 * out.nbytes + sums_of_filters


@pytest.mark.parametrize("channels, kernel_size", [(32, 7), (32, 5), (12, 3)])
@pytest.mark.parametrize("logits", [1e4, -1e4, 0.0])
def test_extreme_logits(logits, channels, kernel_size):
    inputs = make_inputs((1, 9, 17, channels, 1), kernel_size, MODELS[str(kernel_size)][1])
    assert_agrees(with_constant_logits(inputs, kernel_size, logits), kernel_size)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("channels, kernel_size", [(32, 7), (32, 5), (12, 3)])
def test_nan_and_infinite_logits_stay_where_they_are(channels, kernel_size, dtype):
    ghosts = MODELS[str(kernel_size)][1]
    value, logits, *filters = make_inputs((1, 9, 17, channels, 1), kernel_size, ghosts, dtype)
    logits = logits.detach().clone()
    logits[0, 2, 3, 4] = float("nan")
    logits[0, 4, 1, :8] = float("-inf")
    logits[0, 8, 16] = float("-inf")
    result = elsa_attention(value, logits, *filters, kernel_size=kernel_size)
    inputs = [None if t is None else t.detach().double() for t in (value, logits, *filters)]
    expected = elsa_attention_reference(*inputs, kernel_size=kernel_size).to(dtype)
    tolerance = max(1e-5, torch.finfo(dtype).eps * expected.nan_to_num().abs().max().item())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=tolerance, equal_nan=True)
    assert result[0, 2, 3].isnan().all() and result[0, 8, 16].isnan().all()
    assert result.isnan().any(-1).sum() == 2


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("channels, kernel_size", [(32, 7), (32, 5), (12, 3)])
def test_a_nan_value_reaches_its_neighbours_alone(channels, kernel_size, dtype):
    """Tensor cores multiply a few pixels more, with zeros: up to 12 columns and 4 rows away."""
    ghosts = MODELS[str(kernel_size)][1]
    inputs = make_inputs((1, 20, 40, channels, 1), kernel_size, ghosts, dtype)
    inputs[0] = inputs[0].detach().clone()
    inputs[0][0, 10, 20, 5] = float("nan")
    lost = elsa_attention(*inputs, kernel_size=kernel_size)[0].isnan().any(-1)
    radius = kernel_size // 2
    neighbours = slice(10 - radius, 10 + radius + 1), slice(20 - radius, 20 + radius + 1)
    assert lost[neighbours].all()
    rows, columns = (4, 12) if kernel_size == 7 and dtype in LOW else (radius, radius)
    lost[10 - rows : 10 + rows + 1, 20 - columns : 20 + columns + 1] = False
    assert not lost.any()


@needs_cuda
def test_indices_need_more_than_32_bits():
    """Maps of more than 2^31 logits: the last rows alone give the same as within the whole map."""
    height, width = 8192, 5376
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    value = torch.randn(1, height, width, 32, device="cuda", dtype=torch.float16)
    logits = torch.randn(1, height, width, 49, device="cuda", dtype=torch.float16)
    grad = torch.randn_like(value)
    assert logits.numel() > 2**31
    rows = slice(height - 32, height)
    part = [tensor[:, rows].contiguous() for tensor in (grad, value, logits)]
    out = torch.ops.elsa.attention(value, logits, None, None, 7, 1)[:, -16:]
    assert torch.equal(out, elsa_attention(*part[1:], kernel_size=7)[:, -16:])
    whole = torch.ops.elsa.attention_backward(grad, value, logits, None, None, 7, 1)
    alone = torch.ops.elsa.attention_backward(*part, None, None, 7, 1)
    for result, reference in zip(whole[:2], alone[:2], strict=True):
        assert torch.equal(result[:, -16:], reference[:, -16:])


@needs_cuda
def test_dispatcher_refuses_another_device():
    value, logits, _, _ = make_inputs((1, 5, 5, 4, 2), 3)
    with pytest.raises(RuntimeError, match="got cuda:0 for value and cpu for logits"):
        torch.ops.elsa.attention(value.detach(), logits.detach().cpu(), None, None, 3, 1)


def test_dispatcher_refuses_what_the_kernels_cannot_read():
    value, logits, _, _ = (
        None if t is None else t.detach() for t in make_inputs((1, 5, 5, 4, 2), 3)
    )
    attention = torch.ops.elsa.attention
    with pytest.raises(RuntimeError, match="got torch.float32 for value and torch.float64 for"):
        attention(value, logits.double(), None, None, 3, 1)
    wide = logits.new_zeros(1, 5, 5, 2 * 79**2)
    with pytest.raises(RuntimeError, match="kernel_size of at most 77 on CUDA devices, got 79"):
        attention(value, wide, None, None, 79, 1)
    with pytest.raises(RuntimeError, match=r"of at most 2147483647, got kernel_size 3 and"):
        attention(value, logits, None, None, 3, 2**61)
