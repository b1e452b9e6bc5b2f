"""Linear layers against plain PyTorch, on the fast path and off it."""

from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
import torch.nn.functional as F

from elsa_core import linear as module
from elsa_core.linear import Linear, linear

GELU = [{}, {"gelu_before": True}, {"gelu_after": True}]
gelus = pytest.mark.parametrize("gelu", GELU, ids=["none", "before", "after"])


def plain(x, weight, bias, gelu_before=False, gelu_after=False):
    x = F.linear(F.gelu(x) if gelu_before else x, weight, bias)
    return F.gelu(x) if gelu_after else x


def make_inputs(bias=True, dtype=torch.float32, shape=(2, 3, 5, 12)):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=dtype), torch.randn(7, shape[-1], dtype=dtype)]
    tensors.append(torch.randn(7, dtype=dtype) if bias else None)
    return [t if t is None else t.requires_grad_() for t in tensors]


@pytest.fixture
def calls(monkeypatch):
    """Counts the fast path's products."""
    if module._onednn is None or not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN, so there is no fast path")
    seen, product = [], module._product
    monkeypatch.setattr(module, "_product", lambda *a: seen.append(a) or product(*a))
    return seen


@gelus
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slice"])
def test_values_and_gradients(layout, bias, gelu, calls):
    x, weight, bias = make_inputs(bias)
    source = x
    if layout == "transposed":
        x = x.transpose(1, 2)
    elif layout == "slice":
        x = torch.cat([x, x], -1)[..., 6:18]
    wanted = [tensor for tensor in (source, weight, bias) if tensor is not None]
    expected = plain(x, weight, bias, **gelu)
    grad = torch.randn_like(expected)
    out = linear(x, weight, bias, **gelu)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(y, wanted, grad, retain_graph=True) for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias, **gelu), expected)
    assert len(calls) == 3


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_only_what_is_needed_is_differentiated(frozen, calls):
    inputs = dict(zip(("x", "weight", "bias"), make_inputs(), strict=True))
    inputs[frozen].requires_grad_(False)
    linear(*inputs.values()).sum().backward()
    plain_inputs = {k: v.detach().requires_grad_(k != frozen) for k, v in inputs.items()}
    plain(*plain_inputs.values()).sum().backward()
    for name, tensor in inputs.items():
        torch.testing.assert_close(tensor.grad, plain_inputs[name].grad)


@gelus
def test_second_derivative(gelu, calls):
    results = []
    for function in (linear, plain):
        inputs = make_inputs()
        grads = torch.autograd.grad(
            function(*inputs, **gelu).sin().sum(), inputs, create_graph=True
        )
        total = sum(grad.square().sum() for grad in grads)
        results.append(torch.autograd.grad(total, inputs))
    assert calls
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_gelu_of_the_input_is_kept_once(calls):
    x, weight, bias = make_inputs(shape=(4, 4, 16, 32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, weight, bias, gelu_before=True)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), weight.data_ptr()]


def without_onednn(*tensors):
    with torch.backends.mkldnn.flags(enabled=False):
        return linear(*tensors)


ONLOOKERS = {
    "float64": lambda: linear(*make_inputs(dtype=torch.float64)),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16)(linear)(*make_inputs()),
    "vmap": lambda: torch.vmap(linear, (0, None, None))(*make_inputs()),
    "jvp": lambda: torch.func.jvp(linear, *[tuple(t.detach() for t in make_inputs())] * 2),
    "trace": lambda: torch.jit.trace(
        linear, tuple(t.detach() for t in make_inputs()), check_trace=False
    ),
    "compile": lambda: torch.compile(linear, backend="eager", fullgraph=True)(*make_inputs()),
    "meta": lambda: linear(*[t.to("meta") for t in make_inputs()]),
    "empty": lambda: linear(*make_inputs(shape=(0, 3, 3, 12))),
    "oneDNN switched off": lambda: without_onednn(*make_inputs()),
}


@pytest.mark.parametrize("onlooker", ONLOOKERS.values(), ids=ONLOOKERS)
def test_plain_pytorch_wherever_someone_looks_on(onlooker, calls):
    onlooker()
    assert not calls


@pytest.mark.parametrize("name", ["_are_functorch_transforms_active", "_len_torch_dispatch_stack"])
def test_plain_pytorch_where_it_has_other_private_names(name, monkeypatch):
    spec = spec_from_file_location("linear_of_another_torch", module.__file__)
    other = module_from_spec(spec)
    monkeypatch.delattr(torch._C, name)
    spec.loader.exec_module(other)
    monkeypatch.setattr(other, "_product", None)
    inputs = make_inputs()
    torch.testing.assert_close(
        other.linear(*inputs, gelu_before=True), plain(*inputs, gelu_before=True)
    )


def test_flop_counters_see_every_product(calls):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        linear(*make_inputs())
    assert counter.get_total_flops() == 2 * 2 * 3 * 5 * 12 * 7 and not calls


def test_layer_is_a_linear_layer():
    layer = Linear(6, 4)
    x = torch.randn(3, 6)
    assert isinstance(layer, torch.nn.Linear)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x, gelu_after=True), F.gelu(layer(x)))
