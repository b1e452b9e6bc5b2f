"""The forms of the grouped convolution of a product: all are PyTorch's, in value and gradients."""

from importlib import util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from elsa_core import ELSASwin, _grouped_conv, grouped_conv
from elsa_core.layers import ELSA, ChannelsLastConv2d

SHAPES = {  # batch, height, width, groups, channels of a group, kernel size
    "tiny, stage 1": (1, 9, 17, 16, 4, 7),
    "small, stage 2": (2, 3, 40, 16, 8, 7),
    "base, stage 1": (1, 5, 6, 11, 8, 7),
    "one pixel": (1, 1, 1, 4, 4, 7),
    "one group": (2, 4, 3, 1, 6, 3),
    "depthwise": (1, 6, 5, 70, 1, 5),
    "batch 0": (0, 4, 4, 4, 4, 7),
}
ARCH = {"embed_dim": 24, "depths": [2, 1], "num_heads": [1, 2], "group_width": 4}


def make_inputs(shape, dtype=torch.float64, seed=0):
    """Query, key, weight and bias; query and key are slices of a wider map, as in the layer."""
    batch, height, width, groups, group_width, kernel_size = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    channels = groups * group_width
    query, key, _ = draw(batch, height, width, 3 * channels).split(channels, -1)
    weight = draw(channels, group_width, kernel_size, kernel_size)
    weight /= (group_width * kernel_size**2) ** 0.5
    return [tensor.requires_grad_() for tensor in (query, key, weight, draw(channels))]


def definition(query, key, weight, bias):
    x = (query * key).movedim(-1, 1)
    groups = len(weight) // weight.shape[1]
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=groups).movedim(1, -1)


def convolve(query, key, weight, bias):
    groups = len(weight) // weight.shape[1]
    return grouped_conv.product_conv2d(query, key, weight, bias, groups)


def value_and_gradients(function, inputs):
    out = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dense_form_is_the_definition(shape):
    inputs = make_inputs(shape)
    expected = value_and_gradients(definition, inputs)
    with grouped_conv.use("dense"):
        torch.testing.assert_close(value_and_gradients(convolve, inputs), expected)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6, 2, 3), (1, 2, 3, 3, 1, 5)], ids=str)
def test_gradcheck_of_the_dense_form(shape, monkeypatch):
    monkeypatch.setattr(grouped_conv, "DENSE_CHANNELS", 4)
    with grouped_conv.use("dense"):
        assert torch.autograd.gradcheck(convolve, make_inputs(shape), fast_mode=True)
        assert torch.autograd.gradgradcheck(convolve, make_inputs(shape), fast_mode=True)


@pytest.mark.parametrize(
    "groups, width, blocks",
    [(16, 4, 1), (32, 4, 2), (64, 4, 4), (8, 8, 1), (11, 8, 1), (22, 8, 2), (43, 8, 1), (2, 4, 1)],
)
def test_dense_blocks_are_the_smallest_that_are_wide_enough(groups, width, blocks):
    groups_per_block = grouped_conv._groups_per_block(groups, width)
    assert groups_per_block * blocks == groups
    weight = torch.randn(groups * width, width, 3, 3)
    dense = grouped_conv.dense_weight(weight, groups, groups_per_block)
    assert dense.shape == (groups * width, groups_per_block * width, 3, 3)
    assert dense.is_contiguous(memory_format=torch.channels_last)
    assert dense.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_form_loses_nothing_in_16_bits(dtype):
    inputs = make_inputs(SHAPES["tiny, stage 1"], dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = value_and_gradients(definition, exact)
    usual = value_and_gradients(definition, inputs)
    with grouped_conv.use("dense"):
        results = value_and_gradients(convolve, inputs)
    for result, other, reference in zip(results, usual, expected, strict=True):
        error, allowed = ((r.double() - reference).abs().max() for r in (result, other))
        assert error <= 2 * allowed


def outputs_and_gradients(model, image):
    model.zero_grad()
    outs = model(image)
    sum(out.float().square().sum() for out in outs).backward()
    return [*outs, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("options", [{}, {"with_cp": True}], ids=["plain", "recomputed"])
def test_backbone_is_the_same_in_every_form(options):
    torch.manual_seed(0)
    model = ELSASwin(ARCH, out_indices=(0, 1), **options).double()
    names, image = list(model.state_dict()), torch.randn(1, 3, 40, 36, dtype=torch.float64)
    expected = outputs_and_gradients(model, image)
    with grouped_conv.use("dense"):
        torch.testing.assert_close(outputs_and_gradients(model, image), expected)
        assert list(model.state_dict()) == names
        exported = torch.export.export(model, (image,)).module()
    torch.testing.assert_close(list(exported(image)), expected[:2])


def test_backbone_in_autocast():
    torch.manual_seed(0)
    layer, x = ELSA(24, 2, 7, 4), torch.randn(1, 9, 8, 24)
    expected = layer(x)
    for name in ("torch", "dense"):
        with grouped_conv.use(name), torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.01)


def test_compiled_without_graph_break_and_anew_for_another_choice():
    torch._dynamo.reset()
    inputs = make_inputs(SHAPES["small, stage 2"])
    expected = value_and_gradients(definition, inputs)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(convolve, fullgraph=True, backend=backend)
    for name in ("torch", "dense", "torch"):
        with grouped_conv.use(name):
            torch.testing.assert_close(value_and_gradients(compiled, inputs), expected)
    assert len(graphs) == 2


def test_hooks_and_layers_of_a_users_own_are_called():
    layer, x = ELSA(24, 2, 7, 4), torch.randn(1, 3, 4, 24)
    calls = []
    layer.attn[0].register_forward_hook(lambda *call: calls.append(call))

    class Doubled(torch.nn.Module):
        def forward(self, product):
            return 2 * product

    other = ELSA(24, 2, 7, 4)
    other.load_state_dict(layer.state_dict())
    other.attn[0] = Doubled()
    results = []
    for name in ("torch", "dense"):
        with grouped_conv.use(name):
            layer(x)
            results.append(other(x))
    assert len(calls) == 2
    assert torch.equal(*results)


OPERATOR_SHAPES = {name: SHAPES[name] for name in ("tiny, stage 1", "one pixel", "batch 0")}


@pytest.mark.parametrize("shape", OPERATOR_SHAPES.values(), ids=OPERATOR_SHAPES)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_operator_has_default_kernels(shape, has_bias):
    """Whatever the device and type; what the CUDA kernels serve is in test_cuda_grouped_conv.py."""
    *inputs, bias = make_inputs(shape)
    inputs += [bias] * has_bias

    def functions(function):
        return lambda *tensors: function(*tensors) if has_bias else function(*tensors, None)

    results = value_and_gradients(functions(torch.ops.elsa.grouped_conv), inputs)
    torch.testing.assert_close(results, value_and_gradients(functions(definition), inputs))
    assert all(result.is_contiguous() for result in results)


def test_operator_is_registered_as_pytorch_wants():
    inputs = make_inputs((1, 3, 4, 2, 4, 3))
    backward = [torch.randn(1, 3, 4, 8, dtype=torch.float64), *(t.detach() for t in inputs)]
    for bias in (True, False):
        torch.library.opcheck(
            torch.ops.elsa.grouped_conv, (*inputs[:3], inputs[3] if bias else None)
        )
        torch.library.opcheck(
            torch.ops.elsa.grouped_conv_backward, (*backward[:4], backward[4] if bias else None)
        )
    assert torch.autograd.gradcheck(torch.ops.elsa.grouped_conv, inputs, fast_mode=True)


def test_operator_casts_in_autocast():
    inputs = make_inputs(SHAPES["one pixel"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.ops.elsa.grouped_conv(*inputs)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.sum(), inputs)
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_operator_says_what_it_cannot_differentiate():
    inputs = make_inputs(SHAPES["one pixel"])
    out = torch.ops.elsa.grouped_conv(*inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once: .*torch or dense"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="grouped_conv has no forward-mode derivative"):
        torch.func.jvp(
            lambda query: torch.ops.elsa.grouped_conv(query, *inputs[1:]),
            (inputs[0].detach(),),
            (torch.ones_like(inputs[0]),),
        )


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"query": torch.ones(2, 3, 8)}, ValueError, r"query \[B, H, W, C\].*got \[2, 3, 8\]"),
        ({"key": torch.ones(1, 3, 4, 6)}, ValueError, r"key of shape \[1, 3, 4, 8\], got .* 6\]"),
        ({"weight": torch.ones(6, 4, 3, 3)}, ValueError, r"weight \[C, width, K, K\], got"),
        ({"weight": torch.ones(8, 3, 3, 3)}, ValueError, r"C a multiple of width.*\[8, 3, 3, 3\]"),
        ({"weight": torch.ones(8, 4, 2, 2)}, ValueError, r"K odd, got \[8, 4, 2, 2\]"),
        ({"bias": torch.ones(4)}, ValueError, r"bias of shape \[8\], got \[4\]"),
        ({"key": torch.ones(1, 3, 4, 8).double()}, TypeError, "float32 for query and .*64 for key"),
        ({"key": torch.ones(1, 3, 4, 8, device="meta")}, ValueError, "cpu for query and meta for"),
    ],
    ids=str,
)
def test_operator_refuses_what_does_not_match(change, error, words):
    tensors = {name: torch.ones(1, 3, 4, 8) for name in ("query", "key")}
    tensors |= {"weight": torch.ones(8, 4, 3, 3), "bias": torch.ones(8)} | change
    with pytest.raises(error, match=words):
        _grouped_conv.check(**tensors)


@pytest.mark.parametrize(
    "served, change",
    [
        (True, {}),
        (False, {"device": "cpu"}),
        (False, {"dtype": torch.float32}),
        (False, {"weight_dtype": torch.float32}),
        (True, {"weight_dtype": torch.float32, "autocast": torch.float16}),
        (False, {"autocast": torch.bfloat16}),
        (False, {"weight": (12, 4, 7, 7)}),
        (False, {"weight": (16, 2, 7, 7)}),
        (False, {"weight": (16, 8, 5, 5)}),
        (True, {"weight": (16, 8, 7, 7)}),
        (True, {"width": 2**22}),
        (False, {"width": 2**22 + 1}),
        (False, {"major": 7}),
        (True, {"compiled": [800, 900]}),
        (False, {"compiled": [900]}),  # and for 7.5, which is left out
        (False, {"compiled": []}),
    ],
    ids=str,
)
def test_what_the_cuda_kernels_serve(monkeypatch, served, change):
    case = {"device": "cuda", "dtype": torch.float16, "weight": (16, 4, 7, 7), "width": 5}
    case |= {"weight_dtype": torch.float16, "autocast": None, "major": 8} | change
    monkeypatch.setattr(_grouped_conv, "_capabilities", case.get("compiled", [800]))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: case["autocast"] is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: case["autocast"])
    properties = SimpleNamespace(major=case["major"], minor=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = SimpleNamespace(type=case["device"])
    shape = (1, 3, case["width"], case["weight"][0])
    query = SimpleNamespace(device=device, dtype=case["dtype"], shape=shape)
    weight = SimpleNamespace(dtype=case["weight_dtype"], shape=case["weight"])
    assert _grouped_conv.is_served(query, query, weight) == served


@pytest.mark.parametrize("name", ["cuda", "auto"])
@pytest.mark.parametrize("served", [True, False])
def test_operator_is_called_where_it_serves(monkeypatch, served, name):
    monkeypatch.setattr(grouped_conv, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(grouped_conv, "is_served", lambda *tensors: served)
    inputs = make_inputs(SHAPES["tiny, stage 1"])
    with grouped_conv.use(name):
        out = convolve(*inputs)
        # The compiler sees one operator.
        graphs = []
        compiled = torch.compile(
            convolve, fullgraph=True, backend=lambda g, _: graphs.append(g) or g
        )
        torch.testing.assert_close(compiled(*inputs), out)
    assert ("PermuteBackward" in str(out.grad_fn)) != served
    assert ("elsa.grouped_conv" in str(graphs[0].graph)) == served
    torch.testing.assert_close(out, definition(*inputs))


def test_choice_is_restored_or_stays():
    assert grouped_conv.chosen() == "auto"
    with pytest.raises(KeyError), grouped_conv.use("dense"):
        assert grouped_conv.chosen() == "dense"
        raise KeyError
    assert grouped_conv.chosen() == "auto"
    grouped_conv.use("dense")
    assert grouped_conv.chosen() == "dense"
    grouped_conv.use("auto")


def imported_anew():
    spec = util.spec_from_file_location("elsa_core._anew", grouped_conv.__file__)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unknown_form_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="must be one of auto, torch, dense, cuda, got 'fast'"):
        grouped_conv.use("fast")
    assert grouped_conv.chosen() == "auto"
    monkeypatch.setenv("ELSA_CONVOLUTION", "Dense")
    with pytest.raises(ImportError, match="^ELSA_CONVOLUTION must be one of .*, got 'Dense'$"):
        imported_anew()
    for name in ("dense", ""):
        monkeypatch.setenv("ELSA_CONVOLUTION", name)
        assert imported_anew().chosen() == (name or "auto")


@pytest.mark.parametrize("there", [True, False])
def test_layer_gives_both_maps_where_they_are_multiplied_anyway(monkeypatch, there):
    monkeypatch.setattr(grouped_conv, "has_cuda_kernels", lambda: there)
    monkeypatch.setattr(grouped_conv, "is_served", lambda *tensors: tensors[0].shape[1] == 3)
    layer, given = ELSA(24, 2, 7, 4), []
    layer.attn[0].register_forward_hook(lambda module, maps, out: given.append(len(maps)))
    for name in ("auto", "torch", "dense"):
        with grouped_conv.use(name):
            layer(torch.randn(1, 3, 4, 24)), layer(torch.randn(1, 4, 4, 24))
    assert given == [2 if there else 1, 1, 1, 1, 2, 2]


def test_kernels_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(_grouped_conv, "has_cuda_kernels", lambda: False)
    monkeypatch.setattr(grouped_conv, "has_cuda_kernels", lambda: False)
    with pytest.raises(RuntimeError, match="'cuda', but this installation has no CUDA kernels"):
        grouped_conv.use("cuda")
    assert grouped_conv.chosen() == "auto"
    monkeypatch.setenv("ELSA_CONVOLUTION", "cuda")
    with pytest.raises(ImportError, match="^ELSA_CONVOLUTION is 'cuda', but"):
        imported_anew()


@pytest.mark.parametrize("architectures, there", [("", False), ("750", False), ("750,900", True)])
def test_kernels_are_there_if_compiled_for_tensor_cores(monkeypatch, architectures, there):
    dispatch = "_dispatch_has_kernel_for_dispatch_key"
    monkeypatch.setattr(torch._C, dispatch, lambda name, key: bool(architectures))
    operators = SimpleNamespace(grouped_conv=None, cuda_architectures=lambda: architectures)
    monkeypatch.setattr(torch, "ops", SimpleNamespace(elsa=operators))
    assert bool(_grouped_conv._compiled_for()) == there


def test_convolution_of_one_map_has_no_form():
    layer = ChannelsLastConv2d(6, 6, 3, padding=1, groups=2)
    x = torch.randn(2, 5, 4, 6)
    expected = layer(x)
    with grouped_conv.use("dense"):
        assert torch.equal(layer(x), expected)
        torch.testing.assert_close(layer(x, torch.ones_like(x)), expected)
