"""What the operator refuses, in the same words on every way to a kernel."""

import pytest
import torch
from operator_inputs import make_inputs

from elsa_core import _fallback, elsa_attention


def test_double_backward_is_refused_by_name():
    value, logits, add, _ = make_inputs((1, 3, 3, 4, 1), 3)
    out = elsa_attention(value, logits, add, kernel_size=3)
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="elsa::attention .* no double backward"):
        grad.sum().backward()


def wrong(position, change, **options):
    """Inputs of K = 3, 4 channels and 2 heads with one of them changed."""
    inputs = make_inputs((1, 5, 5, 4, 2), 3, ("add", "mul"), torch.float32)
    if position is not None:
        inputs[position] = change(inputs[position].detach())
    return inputs, {"kernel_size": 3, **options}


RANGE = r"at most 2147483647, got kernel_size {} and dilation {}$"
WRONG = {
    "rank": (wrong(0, lambda t: t[0]), ValueError, r"value \[B, H, W, C\].*got \[5, 5, 4\] and"),
    "map": (wrong(1, lambda t: t[:, 1:]), ValueError, r"same B, H, W, .* and \[1, 4, 5, 18\]"),
    "channels": (wrong(0, lambda t: t[..., :3]), ValueError, "multiple of 2 channels.*got 3"),
    "logits": (wrong(1, lambda t: t[..., :17]), ValueError, "multiple of 9 channels.*got 17"),
    "no logits": (wrong(1, lambda t: t[..., :0]), ValueError, "multiple of 9 channels.*got 0"),
    "ghost_add": (wrong(2, lambda t: t[:2]), ValueError, r"ghost_add.*\[4, 3, 3\].*\[2, 3, 3\]"),
    "ghost_mul": (wrong(3, lambda t: t[0]), ValueError, r"ghost_mul.*\[4, 3, 3\].*\[3, 3\]"),
    "dtype": (wrong(1, lambda t: t.double()), TypeError, "float32 for value.*float64 for logits"),
    "integers": (wrong(0, lambda t: t.long()), TypeError, "or bfloat16, got torch.int64 for value"),
    "bool": (wrong(0, lambda t: t > 0), TypeError, "or bfloat16, got torch.bool for value"),
    "complex": (wrong(0, lambda t: t + 1j), TypeError, "or bfloat16, got torch.complex64 for"),
    "float8": (wrong(0, lambda t: t.to(torch.float8_e5m2)), TypeError, "got torch.float8_e5m2 for"),
    "even kernel": (wrong(None, None, kernel_size=4), ValueError, "odd, .*kernel_size, got 4"),
    "no kernel": (wrong(None, None, kernel_size=0), ValueError, "odd, .*kernel_size, got 0"),
    "negative kernel": (wrong(None, None, kernel_size=-3), ValueError, "kernel_size, got -3"),
    "squared kernel overflows": (
        wrong(None, None, kernel_size=2**63 - 1),
        ValueError,
        RANGE.format(2**63 - 1, 1),
    ),
    "dilation": (wrong(None, None, dilation=0), ValueError, "positive dilation, got 0"),
    "negative dilation": (wrong(None, None, dilation=-1), ValueError, "dilation, got -1"),
    "reach": (wrong(None, None, dilation=2**30), ValueError, RANGE.format(3, 2**30)),
    "reach overflows": (wrong(None, None, dilation=2**61), ValueError, RANGE.format(3, 2**61)),
}
MORE = {  # what never comes to a compiled kernel
    "device": (
        wrong(3, lambda t: t.to("meta")),
        ValueError,
        "got cpu for value and meta for ghost",
    ),
    "value elsewhere": (wrong(0, lambda t: t.to("meta")), ValueError, "got meta for value and cpu"),
    "sparse": (wrong(0, lambda t: t.to_sparse()), TypeError, "strided.*torch.sparse_coo for value"),
    "sparse logits": (wrong(1, lambda t: t.to_sparse()), TypeError, "sparse_coo for logits"),
    "sparse, no kernel": (
        wrong(0, lambda t: t.to_sparse(), kernel_size=0),
        ValueError,
        "kernel_size, got 0",
    ),
}


@pytest.mark.parametrize("call, error, message", {**WRONG, **MORE}.values(), ids={**WRONG, **MORE})
def test_wrong_input_is_refused(call, error, message):
    inputs, options = call
    with pytest.raises(error, match=message) as caught:
        elsa_attention(*inputs, **options)
    assert "\n" not in str(caught.value)


def compiled_kernel(*inputs):
    with torch.inference_mode():  # no autograd kernel comes first
        return torch.ops.elsa.attention(*inputs)


def compiled_backward(value, *others):
    grad = torch.empty(value.shape, dtype=value.dtype)
    with torch.inference_mode():
        return torch.ops.elsa.attention_backward(grad, value, *others)


def fake_kernel(*inputs):
    return torch.ops.elsa.attention(*(t.to("meta") if torch.is_tensor(t) else t for t in inputs))


def fake_backward(value, *others):
    others = [t.to("meta") if torch.is_tensor(t) else t for t in (value, *others)]
    return torch.ops.elsa.attention_backward(others[0], *others)


def default_backward(value, *others):
    return _fallback.attention_backward(value, value, *others)


ROUTES = [compiled_kernel, compiled_backward, fake_kernel, fake_backward]
ROUTES += [_fallback.attention, default_backward]


@pytest.mark.parametrize("name", WRONG)
def test_every_kernel_refuses_wrong_input_in_the_same_words(name):
    """Direct calls of the dispatcher must not read out of bounds."""
    (inputs, options), error, message = WRONG[name]
    said = set()
    for route in ROUTES:
        with pytest.raises((RuntimeError, error), match=message) as caught:
            route(*inputs, options["kernel_size"], options.get("dilation", 1))
        said.add(str(caught.value))
    assert len(said) == 1, said


@pytest.mark.parametrize("name", MORE)
def test_dispatcher_refuses_what_kernels_never_see(name):
    (inputs, options), error, message = MORE[name]
    with pytest.raises(error, match=message):
        torch.ops.elsa.attention(*inputs, options["kernel_size"], 1)


def test_gradient_of_another_shape_or_type_is_refused():
    inputs = [tensor.detach() for tensor in make_inputs((1, 5, 5, 4, 2), 3, ("add", "mul"))]
    value = inputs[0]
    for grad in (value[..., :2], value.float(), value.to("meta")):
        with pytest.raises((RuntimeError, ValueError, TypeError), match="elsa_attention needs"):
            torch.ops.elsa.attention_backward(grad, *inputs, 3, 1)


def test_forward_mode_is_refused_by_name():
    """No tangent is lost without a word, neither in a graph nor in a gradient's gradient."""
    value, logits, *_ = (t if t is None else t.detach() for t in make_inputs((1, 3, 3, 4, 1), 3))
    ones = torch.ones_like(value)

    def attention(value):
        return elsa_attention(value, logits, kernel_size=3)

    def dual(function):
        with torch.autograd.forward_ad.dual_level():
            return function(torch.autograd.forward_ad.make_dual(value, ones))

    backward = torch.ops.elsa.attention_backward
    calls = [
        lambda: torch.func.jvp(attention, (value,), (ones,)),
        lambda: torch.func.jacfwd(attention)(value),
        lambda: torch.func.linearize(attention, value),
        lambda: torch.autograd.functional.jacobian(
            attention, value, strategy="forward-mode", vectorize=True
        ),
        lambda: dual(attention),
        lambda: dual(lambda value: torch.ops.elsa.attention(value, logits, None, None, 3, 1)),
        lambda: dual(lambda grad: backward(grad, value, logits, None, None, 3, 1)),
        lambda: torch.no_grad()(dual)(attention),
        lambda: torch.compile(
            lambda value: torch.func.jvp(attention, (value,), (ones,)), backend="aot_eager"
        )(value),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"elsa::attention\w* has no forward-mode"):
            call()


def test_other_transforms_are_right_or_refused():
    value, logits, *_ = (t if t is None else t.detach() for t in make_inputs((1, 3, 3, 4, 1), 3))

    def attention(value):
        return elsa_attention(value, logits, kernel_size=3)

    assert torch.equal(torch.vmap(attention)(torch.stack([value] * 2))[1], attention(value))
    assert torch.equal(
        torch.func.jvp(lambda w: attention(value) * w, (value,), (value,))[1],
        attention(value) * value,
    )
    for transform in (torch.func.grad, torch.func.hessian):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            transform(lambda value: attention(value).sum())(value)
