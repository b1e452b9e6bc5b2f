"""The CUDA kernels of the grouped convolution against PyTorch's convolution in double precision.

All of it needs a GPU, but for what test_cuda_emulation.py runs in an emulation on the CPU.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from operator_inputs import LOW, SHORT_AXES, with_odd_strides

from elsa_core import grouped_conv
from elsa_core.layers import ELSA

EMULATED = "ELSA_EMULATION" in os.environ
DEVICE = "cpu" if EMULATED else "cuda"
pytestmark = [] if EMULATED else [pytest.mark.needs_cuda]

WIDTHS = [4, 8]
SHAPES = {  # batch, height, width, channels
    "one pixel": (1, 1, 1, 8),
    "a tile": (1, 16, 16, 32),
    "a tile and a bit": (1, 17, 17, 40),
    "wide": (2, 3, 40, 16),
    "narrow": (1, 40, 2, 8),
    "odd": (1, 9, 17, 24),
    "stage 1": (1, 9, 17, 64),
    "stage 3": (1, 14, 14, 256) if not EMULATED else (1, 7, 7, 72),
}
LARGE = {"stage 1": (2, 200, 336, 64), "stage 2": (2, 100, 168, 128), "stage 3": (2, 50, 84, 256)}
operator = torch.ops.elsa.grouped_conv


def make_inputs(shape, group_width, dtype, bias=True, seed=0):
    """Query, key, weight and bias; query and key are slices of a wider map, as in the layer."""
    batch, height, width, channels = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    query, key, _ = draw(batch, height, width, 3 * channels).split(channels, -1)
    weight = draw(channels, group_width, 7, 7) / 14
    inputs = [query, key, weight, draw(channels) if bias else None]
    return [None if tensor is None else tensor.requires_grad_() for tensor in inputs]


def definition(query, key, weight, bias):
    groups = weight.shape[0] // weight.shape[1]
    x = (query * key).movedim(-1, 1)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=groups).movedim(1, -1)


def value_and_gradients(function, inputs, change=lambda tensor: tensor):
    """The result, and the gradients for an upstream gradient of 16-bit numbers, as changed."""
    out = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).bfloat16()
    leaves = [tensor for tensor in inputs if tensor is not None]
    return [out, *torch.autograd.grad(out, leaves, change(grad.to(out)))]


def changed(inputs, change):
    """The inputs, each changed and a leaf of its own."""
    return [None if t is None else change(t.detach()).requires_grad_() for t in inputs]


def assert_agrees(inputs, change=lambda tensor: tensor):
    """No further from the exact result than twice PyTorch's own convolution of this type."""
    results = value_and_gradients(operator, inputs, change)
    expected = value_and_gradients(definition, changed(inputs, torch.Tensor.double), change)
    usual = value_and_gradients(definition, inputs, change)
    assert all(result.is_contiguous() for result in results)
    for result, other, reference in zip(results, usual, expected, strict=True):
        assert result.shape == reference.shape and result.dtype == inputs[0].dtype
        if not reference.numel():
            continue
        error, allowed = ((r.double() - reference).abs().max().item() for r in (result, other))
        assert error <= 2 * allowed, (error, allowed, reference.abs().max().item())


def test_extension_has_cuda_kernels():
    """Without them the other tests would judge the default kernels."""
    for name in ("elsa::grouped_conv", "elsa::grouped_conv_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, DEVICE.upper()), (
            "the extension has no CUDA kernels: build it again where there are nvcc and a GPU"
        )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("group_width", WIDTHS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_agrees(shape, group_width, dtype):
    assert_agrees(make_inputs(shape, group_width, dtype))


def test_sums_over_parts_of_the_tiles():
    """More tiles than parts: a block adds several."""
    assert_agrees(make_inputs((386, 1, 1, 16), 8, torch.bfloat16))


@pytest.mark.skipif(EMULATED, reason="takes long in emulation")
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("group_width", WIDTHS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_large_maps(shape, group_width, dtype):
    assert_agrees(make_inputs(shape, group_width, dtype))


def with_apart_rows(tensor):
    """Rows that are further apart than their pixels."""
    return F.pad(tensor, (0, 0, 0, 3))[:, :, : tensor.shape[2]]


def with_odd_address(tensor):
    """Not at 16 bytes."""
    return F.pad(tensor, (1, 1))[..., 1:-1]


LAYOUTS = {
    "channels first": lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1),
    "rows apart": with_apart_rows,
    "odd address": with_odd_address,
    "expanded": lambda t: t[:, :1, :1].expand(t.shape),
    "flipped": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "contiguous": torch.Tensor.contiguous,
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("group_width", WIDTHS)
def test_strided(change, group_width):
    query, key, weight, bias = make_inputs(SHAPES["odd"], group_width, torch.bfloat16)
    maps = changed([query, key], change)
    weight = changed([weight], lambda t: t.transpose(2, 3).contiguous().transpose(2, 3))
    bias = changed([bias], lambda t: torch.stack([t, t], 1)[:, 0])
    assert_agrees([*maps, *weight, *bias], change)


@pytest.mark.parametrize("batch, height, width", SHORT_AXES)
def test_strides_of_short_axes_mean_nothing(batch, height, width):
    inputs = make_inputs((batch, height, width, 8), 4, torch.float16)
    maps = changed(inputs[:2], lambda t: with_odd_strides(t.contiguous()))
    assert_agrees([*maps, *inputs[2:]], with_odd_strides)


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (1, 0, 4, 8), (2, 3, 0, 8)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_empty_maps(shape, bias):
    inputs = make_inputs(shape, 4, torch.bfloat16, bias)
    out, *grads = value_and_gradients(operator, inputs)
    assert out.shape == shape
    leaves = [tensor for tensor in inputs if tensor is not None]
    for grad, tensor in zip(grads, leaves, strict=True):
        assert grad.shape == tensor.shape and not grad.count_nonzero()


def test_without_bias():
    assert_agrees(make_inputs(SHAPES["odd"], 8, torch.float16, bias=False))


def test_equal_inputs_give_equal_bits():
    inputs = make_inputs((2, 17, 18, 40), 8, torch.bfloat16)
    first, again = (value_and_gradients(operator, inputs) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("group_width", WIDTHS)
def test_pixels_that_are_not_finite_stay_where_they_are_read(group_width):
    """They spoil the positions whose taps read them, in the 8 channels of a matrix, and no more."""
    query, key, weight, bias = make_inputs((1, 20, 20, 16), group_width, torch.bfloat16)
    query = query.detach().clone()
    query[0, 9, 9, 3] = float("inf")
    finite = operator(query, key, weight, bias)[0].isfinite()
    spoiled = torch.zeros(20, 20, 16, dtype=torch.bool)
    spoiled[6:13, 6:13, :8] = True
    assert finite[~spoiled.to(DEVICE)].all()
    own_group = spoiled & (torch.arange(16) < group_width)
    assert not finite[own_group.to(DEVICE)].any()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weight": (16, 4, 5, 5)}, r"kernel size of 7, groups of 4 or 8.*\[16, 4, 5, 5\]"),
        ({"weight": (16, 2, 7, 7)}, "groups of 4 or 8 channels"),
        ({"channels": 12, "weight": (12, 4, 7, 7)}, "a multiple of 8 channels"),
        ({"dtype": torch.float32}, "float16 or bfloat16 on CUDA devices, got torch.float32"),
        ({"width": 2**26, "channels": 8, "weight": (8, 8, 7, 7)}, r"width \* channels of at most"),
    ],
    ids=str,
)
def test_refuses_what_the_kernels_do_not_serve(change, words):
    case = {"weight": (16, 4, 7, 7), "channels": 16, "width": 3, "dtype": torch.float16} | change
    options = {"dtype": case["dtype"], "device": DEVICE}
    query = torch.ones(1, 1, 1, case["channels"], **options).expand(1, 2, case["width"], -1)
    weight = torch.ones(case["weight"], **options)
    with pytest.raises(RuntimeError, match=words):
        operator(query, query, weight, None)


OLD = os.environ.get("ELSA_EMULATION_CAPABILITY") == "7.5"


@pytest.mark.skipif(not OLD, reason="of an emulated device")
def test_old_devices_are_refused():
    inputs = make_inputs(SHAPES["one pixel"], 4, torch.float16)
    with pytest.raises(
        RuntimeError, match="device of compute capability 8.0 or later, and kernels"
    ):
        operator(*inputs)


@pytest.fixture
def served(monkeypatch):
    """In the emulation the kernels are those of the CPU."""
    if EMULATED:
        monkeypatch.setattr(grouped_conv, "has_cuda_kernels", lambda: True)
        monkeypatch.setattr(grouped_conv, "is_served", lambda *tensors: True)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("autocast", [True, False])
def test_layer_is_the_same_in_every_form(monkeypatch, autocast):
    torch.manual_seed(0)
    layer, x = ELSA(24, 2, 7, 8).to(DEVICE), torch.randn(2, 9, 8, 24, device=DEVICE)
    with grouped_conv.use("torch"):
        exact = layer(x)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    called = set()
    monkeypatch.setattr(
        torch.ops.elsa, "grouped_conv", lambda *t: called.add(grouped_conv.chosen()) or operator(*t)
    )
    for name in grouped_conv.CHOICES:
        with grouped_conv.use(name), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = layer(x)
        torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.02)
        out.sum().backward()
    assert called == {"auto", "cuda"}


@pytest.mark.usefixtures("served")
def test_compiled_layer_calls_the_operator_by_default():
    layer = ELSA(24, 2, 7, 8).to(DEVICE, torch.bfloat16)
    x, graphs = torch.randn(2, 9, 8, 24, device=DEVICE, dtype=torch.bfloat16), []
    with grouped_conv.use("auto"):
        compiled = torch.compile(layer, fullgraph=True, backend=lambda g, _: graphs.append(g) or g)
        torch.testing.assert_close(compiled(x), layer(x))
    assert "elsa.grouped_conv" in str(graphs[0].graph)
