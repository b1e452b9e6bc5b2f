"""The forms of the grouped convolution of a product: all are PyTorch's, in value and gradients."""

import runpy

import pytest
import torch
import torch.nn.functional as F

from elsa_core import ELSASwin, grouped_conv
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


def test_choice_is_restored_or_stays():
    assert grouped_conv.chosen() == "torch"
    with pytest.raises(KeyError), grouped_conv.use("dense"):
        assert grouped_conv.chosen() == "dense"
        raise KeyError
    assert grouped_conv.chosen() == "torch"
    grouped_conv.use("dense")
    assert grouped_conv.chosen() == "dense"
    grouped_conv.use("torch")


def test_unknown_form_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="must be one of torch, dense.*, got 'fast'"):
        grouped_conv.use("fast")
    assert grouped_conv.chosen() == "torch"
    monkeypatch.setenv("ELSA_CONVOLUTION", "Dense")
    with pytest.raises(ValueError, match="^ELSA_CONVOLUTION must be one of .*, got 'Dense'$"):
        runpy.run_path(grouped_conv.__file__)
    for name in ("dense", ""):
        monkeypatch.setenv("ELSA_CONVOLUTION", name)
        assert runpy.run_path(grouped_conv.__file__)["chosen"]() == (name or "torch")


def test_convolution_of_one_map_has_no_form():
    layer = ChannelsLastConv2d(6, 6, 3, padding=1, groups=2)
    x = torch.randn(2, 5, 4, 6)
    expected = layer(x)
    with grouped_conv.use("dense"):
        assert torch.equal(layer(x), expected)
        torch.testing.assert_close(layer(x, torch.ones_like(x)), expected)
