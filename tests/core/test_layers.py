"""ELSA and window attention against naive compositions of the same definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from naive_elsa import naive_elsa, randomise

from elsa_core.layers import ELSA, ChannelsLastConv2d, PointwiseConv2d, WindowAttention
from elsa_core.operator import has_extension


@pytest.mark.parametrize(("lam", "gamma"), [(0, 1), (0, 0.5), (1, 0), (2, 1), (0, 0)])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_elsa_is_its_definition(lam, gamma, kernel_size):
    torch.manual_seed(0)
    layer = randomise(ELSA(12, 3, kernel_size, 3, lam, gamma).double())
    x = torch.randn(2, 5, 9, 12, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), naive_elsa(layer, x, 9, lam, gamma))


def test_elsa_gradients_are_those_of_its_definition():
    torch.manual_seed(0)
    layer = randomise(ELSA(8, 2, 5, 4, lam=1, gamma=2).double())
    x = torch.randn(1, 6, 7, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    weight = torch.randn(1, 6, 7, 8, dtype=torch.float64)
    ours = torch.autograd.grad((layer(x) * weight).sum(), inputs)
    naive = torch.autograd.grad((naive_elsa(layer, x, 4, 1, 2) * weight).sum(), inputs)
    torch.testing.assert_close(ours, naive)


@pytest.mark.parametrize(
    ("dim", "group_width", "dim_qk"),
    [(96, 4, 64), (96, 8, 64), (128, 8, 88), (256, 8, 176), (32, 8, 24), (20, 4, 12), (3, 8, 8)],
)
def test_elsa_rounds_query_and_key_up_to_whole_groups(dim, group_width, dim_qk):
    layer = ELSA(dim, 1, 3, group_width)
    assert layer.pre_proj.weight.shape == (2 * dim_qk + dim, dim, 1, 1)
    assert layer.attn[0].weight.shape == (dim_qk, group_width, 3, 3)
    assert layer.attn[2].weight.shape == (9, dim_qk, 1, 1)


def test_ghost_head_initialisation():
    torch.manual_seed(0)
    both = ELSA(96, 3, 7, 4, lam=1, gamma=1).ghost_head.detach()
    assert both.shape == (2, 1, 96, 7, 7)
    assert both[0].std().item() == pytest.approx(1, rel=0.05)
    assert both[1].std().item() == pytest.approx(0.02, rel=0.05)
    assert ELSA(96, 3, 7, 4, lam=0, gamma=1).ghost_head.std().item() == pytest.approx(0.02, rel=0.1)
    assert ELSA(96, 3, 7, 4, lam=1, gamma=0).ghost_head.shape == (1, 96, 7, 7)
    assert ELSA(96, 3, 7, 4, lam=0, gamma=0).ghost_head is None


@pytest.mark.parametrize(("lam", "gamma"), [(0, 1), (1, 1), (0, 0)])
def test_elsa_attention_dropout(lam, gamma):
    torch.manual_seed(0)
    layer = randomise(ELSA(8, 2, 3, 4, lam, gamma, attn_drop=0.4).double())
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = layer.eval()(x)
        torch.testing.assert_close(whole, naive_elsa(layer, x, 4, lam, gamma))
        draws = layer.train()(x.expand(4000, -1, -1, -1))
        assert not torch.equal(draws[0], draws[1])
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - whole[0]) / error.clamp(min=1e-9)).abs().max() < 6
        layer.attn_drop = 1e-12
        torch.testing.assert_close(layer(x), whole)


def test_channels_last_convolutions():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 6)
    pointwise, grouped = PointwiseConv2d(6, 10), ChannelsLastConv2d(6, 6, 3, padding=1, groups=2)
    for layer in (pointwise, grouped):
        expected = torch.nn.Conv2d.forward(grouped, x.permute(0, 3, 1, 2))
        if layer is pointwise:
            expected = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias)
        out = layer(x)
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected.permute(0, 2, 3, 1))


def naive_window_attention(layer, x):
    """One window, one head and one query at a time."""
    batch, height, width, channels = x.shape
    size, shift, heads = layer.window_size, layer.shift, layer.num_heads
    head_dim = channels // heads
    full_height, full_width = -(-height // size) * size, -(-width // size) * size
    out = x.new_zeros(batch, full_height, full_width, channels)
    padded = x.new_zeros(batch, full_height, full_width, channels)
    padded[:, :height, :width] = x
    value, query, key = layer.pre_proj(padded).reshape(*out.shape[:3], 3, heads, head_dim).unbind(3)
    for top in range(0, full_height, size):
        for left in range(0, full_width, size):
            # positions of one window: in the shifted frame, and where they are in the map
            frame = [(top + i, left + j) for i in range(size) for j in range(size)]
            places = [((y + shift) % full_height, (x + shift) % full_width) for y, x in frame]
            wrapped = [(y + shift >= full_height, x + shift >= full_width) for y, x in frame]
            rows, columns = zip(*places, strict=True)
            for head in range(heads):
                keys, values = key[:, rows, columns, head], value[:, rows, columns, head]
                for (y, x_), place, origin in zip(frame, places, wrapped, strict=True):
                    bias = x.new_tensor([0.0 if o == origin else -100.0 for o in wrapped])
                    index = [
                        (ky - y + size - 1) * (2 * size - 1) + kx - x_ + size - 1
                        for ky, kx in frame
                    ]
                    logits = torch.einsum("bd,bkd->bk", query[:, place[0], place[1], head], keys)
                    weights = (logits * head_dim**-0.5 + layer.rb[head, index] + bias).softmax(-1)
                    out[:, place[0], place[1], head * head_dim : (head + 1) * head_dim] = (
                        torch.einsum("bk,bkd->bd", weights, values)
                    )
    return layer.post_proj(out[:, :height, :width])


@pytest.mark.parametrize(
    ("heads", "size", "shift", "height_width"),
    [(2, 3, shift, shape) for shift in (0, 1) for shape in ((3, 3), (2, 1), (6, 9), (7, 5))]
    + [(1, 7, 0, (10, 8)), (1, 7, 3, (10, 8))],  # the published size
)
def test_window_attention_is_its_definition(heads, size, shift, height_width):
    torch.manual_seed(0)
    layer = randomise(WindowAttention(4 * heads, heads, size, shift).double())
    x = torch.randn(heads, *height_width, 4 * heads, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), naive_window_attention(layer, x))


def test_relative_position_is_key_minus_query_row_major():
    index = WindowAttention(4, 1, 7).relative_id.reshape(7, 7, 7, 7)
    assert index[0, 0, 0, 0] == 6 * 13 + 6
    assert index[0, 0, 6, 5] == 12 * 13 + 11
    assert index[6, 6, 0, 0] == 0
    assert index[2, 3, 2, 4] == 6 * 13 + 7


def test_window_attention_dropout_only_while_training():
    torch.manual_seed(0)
    layer = randomise(WindowAttention(8, 2, 3, attn_drop=0.5))
    x = torch.randn(1, 3, 3, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.fixture
def layer_and_map():
    torch.manual_seed(0)
    return ELSA(24, 3, 7, 4), torch.randn(1, 16, 16, 24, requires_grad=True)


def test_elsa_keeps_each_map_once_for_the_backward_pass(layer_and_map):
    """Input, projection, Hadamard product, convolution, logits and result; no GELU, no softmax."""
    layer, x = layer_and_map
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    channels = 24 + (16 + 16 + 24) + 16 + 16 + 3 * 49 + 24
    assert sum(kept.values()) <= 4 * 16 * 16 * channels


@pytest.mark.skipif(not has_extension, reason="plain PyTorch, without the extension, copies")
def test_elsa_never_rearranges_a_map(layer_and_map):
    """Between linear layers, convolution and operator no map is copied, there or back."""
    layer, x = layer_and_map
    smallest = 16 * 16 * 16  # numbers of the smallest map
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(x).backward(torch.ones_like(x))
    copies = ("aten::copy_", "aten::clone")  # aten::contiguous calls them where it copies
    shapes = [s for event in profile.events() if event.name in copies for s in event.input_shapes]
    assert shapes and all(math.prod(shape) < smallest for shape in shapes), shapes


def test_ghost_head_is_never_expanded_over_the_batch():
    layer, x = ELSA(24, 3, 7, 4), torch.randn(5, 8, 8, 24)
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(x)
    calls = [event for event in profile.events() if event.name == "elsa::attention"]
    assert calls and all(list(event.input_shapes[2]) == [24, 7, 7] for event in calls)


def test_layers_made_without_memory_are_filled_later():
    """As large models are loaded: on the meta device, then memory, then what no file has."""
    with torch.device("meta"):
        window, elsa = WindowAttention(12, 3, 5), ELSA(24, 3, 7, 4, lam=1)
    for layer in (window, elsa):
        layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(window.relative_id, WindowAttention(12, 3, 5).relative_id)
    assert window.rb.abs().max() < 0.2 and elsa.ghost_head.shape == (2, 1, 24, 7, 7)
    assert 0.9 < elsa.ghost_head[0].std() < 1.1 and 0.01 < elsa.ghost_head[1].std() < 0.03
