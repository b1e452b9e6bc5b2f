"""What holds for the operator at any shape, stride and value, with any of its CPU kernels."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_inputs import GHOSTS, LOW, assert_rounds_once, make_inputs, with_odd_strides

from elsa_core import elsa_attention, elsa_attention_reference

SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)
EXTREMES = [0.0, 1e4, -1e4, 88.0, -87.5, -104.0, 3e38, -3e38]


def run(function, tensors, **options):
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*tensors, **options)
    generator = torch.Generator().manual_seed(7)
    grad = with_odd_strides(torch.randn(out.shape, generator=generator).to(out.dtype))
    return [out, *torch.autograd.grad(out, [t for t in tensors if t is not None], grad)]


@st.composite
def problems(draw, published=False):
    """Tensors in double precision and the options of a call; as in published models if so."""
    kernel = draw(st.sampled_from([5, 7] if published else [1, 3, 5, 7, 9]))
    depth = 32 if published else draw(st.sampled_from([1, 3, 8, 16, 17, 32, 40]))
    heads = draw(st.integers(1, 4))
    shape = (draw(st.integers(0, 2)), draw(st.integers(1, 20)), draw(st.integers(1, 21)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(*size):
        numbers = torch.randn(*size, generator=generator, dtype=torch.float64)
        layouts = ["contiguous", "reversed", "slice", "every second", "odd"]
        layout = draw(st.sampled_from(layouts))
        if layout == "reversed":
            order = tuple(reversed(range(numbers.dim())))
            return numbers.permute(order).contiguous().permute(order)
        if layout == "slice":
            return torch.cat([numbers, numbers], -1)[..., size[-1] :]
        if layout == "every second":
            return numbers.repeat_interleave(2, 1)[:, ::2]
        if layout == "odd":
            return with_odd_strides(numbers)
        return numbers

    channels = heads * depth
    filters = (channels, kernel, kernel)
    tensors = [
        tensor(*shape, channels),
        tensor(*shape, heads * kernel**2),
        tensor(*filters) if draw(st.booleans()) else None,
        tensor(*filters) if (kernel == 5 or not published) and draw(st.booleans()) else None,
    ]
    dilation = 1 if published else draw(st.integers(1, 3))
    return tensors, {"kernel_size": kernel, "dilation": dilation}


@SETTINGS
@given(problems())
def test_agrees_with_reference(problem):
    tensors, options = problem
    singles = [None if t is None else t.float() for t in tensors]
    exact = [None if t is None else t.double() for t in singles]
    results = run(elsa_attention, singles, **options)
    for result, truth in zip(results, run(elsa_attention_reference, exact, **options), strict=True):
        scale = truth.abs().max().item() if truth.numel() else 0
        torch.testing.assert_close(result.double(), truth, rtol=0, atol=2e-5 * max(1, scale))


@SETTINGS
@given(problems(published=True), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_published_sizes_round_less_than_plain_pytorch(problem, dtype):
    tensors, options = problem
    inputs = [None if t is None else t.to(dtype) for t in tensors]
    exact = [None if t is None else t.double() for t in inputs]
    results = run(elsa_attention, inputs, **options)
    plain = run(elsa_attention_reference, inputs, **options)
    truths = run(elsa_attention_reference, exact, **options)
    for result, other, truth in zip(results, plain, truths, strict=True):
        if not truth.numel():
            continue
        rounding = torch.finfo(dtype).eps / 2 * truth.abs().max()
        error = (result.double() - truth).abs().max()
        assert error <= max(2 * (other.double() - truth).abs().max(), 8 * rounding)


@SETTINGS
@given(problems() | problems(published=True), st.data())
def test_extreme_logits_are_those_of_a_softmax(problem, data):
    tensors, options = problem
    value, logits, add, mul = [None if t is None else t.float().contiguous() for t in tensors]
    flat = logits.view(-1)
    for _ in range(min(8, flat.numel())):
        place = data.draw(st.integers(0, flat.numel() - 1))
        flat[place] = data.draw(st.sampled_from([*EXTREMES, -torch.inf]))
    if options["kernel_size"] == 1:
        flat.clamp_(min=-3e38)  # a row of nothing but -infinity has a test of its own
    result = elsa_attention(value, logits, add, mul, **options)
    exact = [None if t is None else t.double() for t in (value, logits, add, mul)]
    expected = elsa_attention_reference(*exact, **options)
    assert result.isfinite().all()
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_undefined_rows_are_nan_as_with_a_softmax(poison, kernel):
    """A NaN, a +infinity or nothing but -infinity among a head's logits: that head, there, is NaN
    (forward, and in the gradient of those logits), and nothing else is."""
    torch.manual_seed(0)
    taps = kernel**2
    value, logits = torch.randn(1, 6, 9, 64), torch.randn(1, 6, 9, 2 * taps)
    logits[0, 3, 4, taps : (2 * taps if poison == -torch.inf else taps + 1)] = poison
    add = torch.randn(64, kernel, kernel)
    results = run(elsa_attention, [value, logits, add], kernel_size=kernel)
    expected = run(elsa_attention_reference, [value, logits, add], kernel_size=kernel)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert results[0].isnan().sum() == 32 and results[0][0, 3, 4, 32:].isnan().all()


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_softmax_is_within_few_units_in_the_last_place(kernel):
    """The exponential's error over its whole range, seen through a value of ones: the attention of
    one position at a time, by a multiplicative ghost filter that picks one tap."""
    taps = kernel**2
    logits = torch.linspace(0, -86, 64 * (taps - 1)).view(1, 64, 1, taps - 1)
    logits = torch.cat([logits, torch.zeros(1, 64, 1, 1)], -1)
    value = torch.ones(1, 64, 1, taps)
    pick = torch.zeros(taps, kernel, kernel)
    pick[:, kernel // 2, kernel // 2] = 1
    for shift in range(taps):
        turned = logits.roll(shift, -1)
        result = elsa_attention(value, turned, None, pick, kernel_size=kernel)[..., 0]
        exact = turned.double().softmax(-1)[..., taps // 2]
        error = ((result.double() - exact) / exact).abs().max().item()
        assert error < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(1, 9, 10, 64, 2), (2, 5, 21, 51, 3)], ids=str)
@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
def test_low_precision_is_at_most_twice_as_far_off_as_plain_pytorch(ghosts, shape, dtype):
    assert_rounds_once(make_inputs(shape, 7, ghosts, dtype), 7)


CHECK = """
import torch
from elsa_core import doctor
assert torch.ops.elsa.cpu_capability() == {expected!r}, torch.ops.elsa.cpu_capability()
report = doctor.examine(frameworks=False)
assert not report.faults, report.lines
from operator_inputs import assert_agrees, make_inputs
from tests_properties import test_undefined_rows_are_nan_as_with_a_softmax as undefined
from tests_properties import test_softmax_is_within_few_units_in_the_last_place as exact
undefined(torch.nan, 7), undefined(-torch.inf, 7), undefined(torch.inf, 3), exact(7)
undefined(torch.nan, 5), undefined(-torch.inf, 5), undefined(torch.inf, 5), exact(5)
for dtype in (torch.float32, torch.float64):
    assert_agrees(make_inputs((1, 18, 19, 64, 2), 5, ("add", "mul"), dtype), 5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit, expected", [("default", "portable"), ("avx2", "avx2")])
def test_narrower_kernels(limit, expected):
    """The kernels that this machine would not choose."""
    best = torch.ops.elsa.cpu_capability()
    if expected == "avx2" and best == "portable":
        pytest.skip("this machine has no AVX2")
    program = CHECK.format(expected=expected).replace("tests_properties", __name__)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": limit}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
