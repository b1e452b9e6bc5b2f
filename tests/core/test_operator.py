"""The operator against its definition: values, gradients, registrations and refusals."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import operator_inputs
import pytest
import torch
from operator_inputs import GHOSTS, LOW, SHORT_AXES, make_inputs, value_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

import elsa_core
from elsa_core import _fallback, elsa_attention, elsa_attention_reference, operator
from elsa_core.operator import has_extension

SHAPES = {
    "published": (1, 5, 19, 64, 2),
    "two chunks and a bit": (1, 37, 3, 32, 1),
    **operator_inputs.SHAPES,
}


def default_kernels(value, logits, ghost_add=None, ghost_mul=None, *, kernel_size, dilation=1):
    """The pure PyTorch kernels, whether or not there are compiled ones."""

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return _fallback.attention(*tensors, kernel_size, dilation)

        @staticmethod
        def backward(ctx, grad):
            grads = _fallback.attention_backward(grad, *ctx.saved_tensors, kernel_size, dilation)
            return tuple(
                g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=True)
            )

    return Operator.apply(value, logits, ghost_add, ghost_mul)


def test_compiled_operator_is_tested():
    assert has_extension, "the extension is not built: run 'make setup'"


@pytest.mark.parametrize(
    "function, dtype",
    [
        (elsa_attention, torch.float32),
        (elsa_attention, torch.float64),
        (default_kernels, torch.float64),
    ],
    ids=["compiled-float32", "compiled-float64", "default-float64"],
)
@pytest.mark.parametrize(
    "kernel_size, dilation", [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2), (9, 1)]
)
@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_agrees_with_reference(shape, ghosts, kernel_size, dilation, function, dtype):
    inputs = make_inputs(shape, kernel_size, ghosts, dtype)
    operator_inputs.assert_agrees(inputs, kernel_size, dilation, function)


def test_reference_is_the_formula_of_the_paper():
    """The definition, spelled out number by number (reference section 2, steps 4 to 6)."""
    batch, height, width, channels, heads, kernel_size, dilation = 1, 3, 4, 4, 2, 3, 2
    inputs = make_inputs((batch, height, width, channels, heads), kernel_size, ("add", "mul"))
    value, logits, add, mul = (tensor.detach() for tensor in inputs)
    expected = torch.zeros_like(value)
    for y, x, c in itertools.product(range(height), range(width), range(channels)):
        head = c // (channels // heads)
        taps = kernel_size**2
        weights = logits[0, y, x, head * taps : (head + 1) * taps].exp()
        for ky, kx in itertools.product(range(kernel_size), repeat=2):
            sy, sx = y + (ky - 1) * dilation, x + (kx - 1) * dilation
            if 0 <= sy < height and 0 <= sx < width:
                attn = weights[ky * kernel_size + kx] / weights.sum()
                weight = mul[c, ky, kx] * attn + add[c, ky, kx]
                expected[0, y, x, c] += weight * value[0, sy, sx, c]
    result = elsa_attention_reference(
        value, logits, add, mul, kernel_size=kernel_size, dilation=dilation
    )
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
@pytest.mark.parametrize(
    "shape, kernel_size, dilation",
    [
        ((2, 3, 4, 6, 2), 3, 1),
        ((2, 3, 4, 6, 2), 3, 2),
        ((2, 3, 4, 6, 2), 5, 1),
        ((1, 2, 3, 17, 1), 5, 1),  # 17 channels are computed as 32 are
    ],
    ids=str,
)
def test_gradcheck(ghosts, shape, kernel_size, dilation):
    inputs = make_inputs(shape, kernel_size, ghosts)
    operator_inputs.assert_gradients_are_right(inputs, kernel_size, dilation)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
def test_default_kernels_round_as_the_compiled_ones(ghosts, dtype):
    inputs = make_inputs((2, 14, 17, 64, 2), 7, ghosts, dtype)
    exact = operator_inputs.changed(inputs, torch.Tensor.double)
    truths = value_and_gradients(elsa_attention_reference, exact, numbers=dtype)
    runs = (
        value_and_gradients(f, inputs, numbers=dtype) for f in (default_kernels, elsa_attention)
    )
    for ours, compiled, truth in zip(*runs, truths, strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).abs().max() <= 1.5 * (compiled - truth).abs().max()


class Launches(TorchDispatchMode):
    """Counts the operators that would launch a kernel, and keeps the arguments of all."""

    def __init__(self):
        super().__init__()
        self.count, self.calls = 0, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += not function.is_view
        self.calls.append((function.name(), arguments))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_kernels_launch_two_kernels_for_each_offset(dtype, ghosts):
    inputs = make_inputs((1, 4, 5, 64, 2), 7, ghosts, dtype)
    with torch.no_grad(), Launches() as launches:
        _fallback.attention(*inputs, 7, 1)
    assert launches.count <= 2 * 49 + 12


@pytest.mark.parametrize("function", ["compiled", "default"])
@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
def test_gradients_of_frozen_filters_are_left_out(ghosts, function):
    backward = {"compiled": torch.ops.elsa, "default": _fallback}[function].attention_backward
    inputs = make_inputs((2, 5, 6, 8, 2), 3, ghosts)
    operator_inputs.assert_frozen_filters_are_left_out(backward, inputs, 3)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_filters_are_seen_by_the_backward_pass(frozen):
    inputs = make_inputs((1, 4, 5, 8, 2), 3)
    inputs[2].requires_grad_(not frozen)
    with Launches() as launches:
        elsa_attention(*inputs, kernel_size=3).sum().backward()
    (arguments,) = [of for name, of in launches.calls if name == "elsa::attention_backward"]
    assert (arguments[7:] == (False,)) == frozen
    assert (inputs[2].grad is None) == frozen


@pytest.mark.parametrize("kernel_size, heads", [(3, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
def test_opcheck(ghosts, kernel_size, heads):
    inputs = make_inputs((2, 4, 5, 8, heads), kernel_size, ghosts, torch.float32)
    operator_inputs.assert_registrations_are_right(inputs, kernel_size)


def test_extension_with_another_schema_is_refused(monkeypatch):
    operator._define(operator._library)
    monkeypatch.setattr(_fallback, "attention_backward", _fallback.attention)
    with pytest.raises(ImportError, match=r"_C.*\.so was built from other sources .*'pip install"):
        operator._define(operator._library)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("offset", [3, 8], ids="offset {}".format)
def test_strided_inputs(offset, kernel_size):
    inputs = make_inputs((2, 8, 9, 64, 2), kernel_size, ("add", "mul"))
    operator_inputs.assert_strides_do_not_matter(inputs, kernel_size, offset)


@pytest.mark.parametrize("shape", SHORT_AXES, ids=str)
def test_strides_of_axes_of_length_1_mean_nothing(shape):
    inputs = make_inputs((*shape, 64, 2), 7, ("add", "mul"))
    operator_inputs.assert_strides_of_axes_of_length_1_mean_nothing(inputs, 7)


@pytest.mark.parametrize("kernel_size, ghosts", [(7, GHOSTS["add"]), (5, GHOSTS["both"])])
def test_result_does_not_depend_on_threads(kernel_size, ghosts):
    inputs = make_inputs((2, 40, 12, 64, 2), kernel_size, ghosts, torch.float32)
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(value_and_gradients(elsa_attention, inputs, kernel_size))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@pytest.mark.parametrize("logits", [1e4, -1e4, 0.0])
def test_extreme_logits(logits):
    inputs = make_inputs((1, 5, 6, 32, 1), 7, dtype=torch.float32)
    operator_inputs.assert_agrees(operator_inputs.with_constant_logits(inputs, 7, logits))


def test_autocast_computes_in_its_own_type():
    inputs = make_inputs((1, 5, 6, 16, 2), 3, dtype=torch.float32)
    operator_inputs.assert_autocast_computes_in_its_own_type(inputs, 3, torch.bfloat16)


def test_compiles_without_graph_break():
    inputs = make_inputs((1, 5, 6, 16, 2), 3, dtype=torch.float32)
    operator_inputs.assert_compiles_without_graph_break(inputs, 3)


@pytest.mark.parametrize("change", [torch.Tensor.long, lambda t: t.to(torch.float8_e5m2)])
def test_autocast_casts_no_other_type(change):
    value, logits, *_ = (t if t is None else t.detach() for t in make_inputs((1, 5, 5, 4, 2), 3))
    refused = pytest.raises((RuntimeError, TypeError), match="float32, float64, float16 or")
    with torch.autocast("cpu"), refused:
        torch.ops.elsa.attention(change(value), logits.float(), None, None, 3, 1)


def test_meta_tensors_have_a_result():
    inputs = [t.to("meta") for t in make_inputs((1, 5, 5, 4, 2), 3, ("add", "mul"))]
    assert elsa_attention(*inputs, kernel_size=3).shape == (1, 5, 5, 4)


FAR = [(3, 2**30 - 1), (7, 1000), (7, 5), (7, 4), (5, 3)]


@pytest.mark.parametrize("function", [elsa_attention, default_kernels])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8, 2), (1, 3, 9, 8, 2), (1, 40, 2, 8, 1)], ids=str)
@pytest.mark.parametrize("kernel_size, dilation", FAR, ids=str)
def test_taps_beyond_the_map_read_zeros_however_far(shape, kernel_size, dilation, function):
    inputs = make_inputs(shape, kernel_size, ("add", "mul"))
    results = value_and_gradients(function, inputs, kernel_size, dilation)
    expected = value_and_gradients(plain_formula, inputs, kernel_size, dilation)
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)


def plain_formula(value, logits, add, mul, *, kernel_size, dilation):
    """The definition without any padding."""
    batch, height, width, channels = value.shape
    heads = logits.shape[-1] // kernel_size**2
    attention = logits.unflatten(-1, (heads, -1)).softmax(-1)
    attention = attention.repeat_interleave(channels // heads, 3)
    out = torch.zeros_like(value)
    for y, x in itertools.product(range(height), range(width)):
        for ky, kx in itertools.product(range(kernel_size), repeat=2):
            at = y + (ky - kernel_size // 2) * dilation, x + (kx - kernel_size // 2) * dilation
            if 0 <= at[0] < height and 0 <= at[1] < width:
                weight = attention[:, y, x, :, ky * kernel_size + kx] * mul[:, ky, kx]
                one = torch.zeros_like(value).index_put(
                    (torch.arange(batch), torch.tensor(y), torch.tensor(x)),
                    (weight + add[:, ky, kx]) * value[:, at[0], at[1]],
                )
                out = out + one
    return out


MEMORY = """
import resource
import torch
from elsa_core import operator
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for shape in [(1, 1, 32), (1, 64, 32), (64, 64, 32)]:
    value, logits = torch.randn(1, *shape), torch.randn(1, *shape[:2], 49)
    before = peak()
    for dilation in (1000, 2**31 // 6 - 1):
        out = torch.ops.elsa.attention(value, logits, None, None, 7, dilation)
        torch.ops.elsa.attention_backward(out, value, logits, None, None, 7, dilation)
    print(shape, (peak() - before) // 1024)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_map_whatever_the_dilation():
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used = [int(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(used) == 3 and max(used[:2]) < 20 and used[2] < 60, done.stdout


@pytest.mark.slow
def test_without_extension(tmp_path):
    """A package without its binary imports, says so once, computes and trains."""
    source = Path(elsa_core.__file__).parent
    shutil.copytree(
        source, tmp_path / "elsa_core", ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    program = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import elsa_core, elsa_core.operator
    import torch
    assert not elsa_core.operator.has_extension
    arch = dict(embed_dim=12, depths=[1, 1], num_heads=[1, 2], group_width=4)
    model = elsa_core.ELSASwin(arch, out_indices=(0, 1))
    outs = model(torch.randn(1, 3, 32, 32))
    sum(out.sum() for out in outs).backward()
    assert all(p.grad is not None for p in model.parameters())
messages = [str(w.message) for w in caught if "compiled operator" in str(w.message)]
assert len(messages) == 1, messages
print(messages[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},  # where another copy may have a binary
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "without its compiled operator" in done.stdout
