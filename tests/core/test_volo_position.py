"""ELSA-VOLO's position embedding at other sizes: resized once, and never that of other weights."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from volo_models import build, resized

import elsa_core.volo
from elsa_core import ELSAVolo

GRID = (3, 5)


def make():
    return build(ELSAVolo, arch=dict(depths=(1,) * 4, embed_dims=(4, 6), num_heads=(1, 1)))


def grid(*size, dtype=torch.float32):
    return torch.zeros(1, *(size or GRID), 1, dtype=dtype)


@pytest.fixture
def calls(monkeypatch):
    """The sizes that a position embedding is resized to."""
    sizes = []
    resize = elsa_core.volo.resize_position

    def counted(position, size):
        sizes.append(tuple(size))
        return resize(position, size)

    monkeypatch.setattr(elsa_core.volo, "resize_position", counted)
    return sizes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_each_size_is_resized_once(mode, calls):
    model = make().eval()
    images = [torch.zeros(1, 3, *size) for size in [(32, 48), (40, 48), (48, 32), (64, 64)]]
    with mode():
        for image in images * 3:
            model(image)
        own = grid(4, 4)
        assert model.position(own) is model.pos_embed  # its own size needs nothing
    assert sorted(set(calls)) == [(2, 3), (3, 2), (3, 3), (4, 4)]
    assert [calls.count(size) for size in [(2, 3), (3, 2), (3, 3)]] == [1, 1, 1]


def test_gradients_are_never_of_a_kept_tensor(calls):
    model = make()
    with torch.no_grad():
        kept = model.position(grid())
    for _ in range(2):
        position = model.position(grid())
        assert position is not kept and position.requires_grad and not kept.requires_grad
        (gradient,) = torch.autograd.grad(position.sum(), model.pos_embed)
        assert gradient.sum().item() == pytest.approx(position.numel(), rel=1e-5)
    assert len(calls) == 3


def test_dropout_follows_in_training():
    model = build(ELSAVolo, drop_rate=0.5)
    inputs = []
    model.network[2][0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    image = torch.randn(1, 3, 48, 80)
    model(image)
    assert 0.3 < (inputs[0] == 0).float().mean() < 0.7
    model.eval()(image)
    assert not (inputs[1] == 0).any()


def optimizer_step(model):
    model.pos_embed.grad = torch.ones_like(model.pos_embed)
    torch.optim.SGD([model.pos_embed], lr=1.0).step()


def fused_step(model):
    model.pos_embed.grad = torch.ones_like(model.pos_embed)
    torch.optim.AdamW([model.pos_embed], lr=1.0, fused=True).step()


def load(model):
    model.load_state_dict({**model.state_dict(), "pos_embed": torch.randn(1, 4, 4, 6)})


def assign(model):
    state = {**model.state_dict(), "pos_embed": torch.randn(1, 4, 4, 6)}
    model.load_state_dict(state, assign=True)


def average(model):
    model.pos_embed.data.copy_(torch.randn(1, 4, 4, 6))  # no version of the tensor changes


def one_element(model):
    model.pos_embed.data.view(-1)[-1] += 1


def replace(model):
    model.pos_embed = torch.nn.Parameter(torch.randn(1, 4, 4, 6))


def new_grid(model):
    model.pos_embed = torch.nn.Parameter(torch.randn(1, 7, 2, 6))


def reset(model):
    model.reset_parameters()


def through_numpy(model):
    model.pos_embed.detach().numpy()[:] += 1


CHANGES = [
    optimizer_step,
    fused_step,
    load,
    assign,
    average,
    one_element,
    replace,
    new_grid,
    reset,
    through_numpy,
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_embedding_is_seen(change, mode):
    model = make()
    with mode():
        before = model.position(grid()).clone()
    change(model)
    with mode():
        after = model.position(grid())
        torch.testing.assert_close(after, resized(model.pos_embed, GRID))
        assert not torch.equal(after, before) and model.position(grid()) is after


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_change_of_the_dtype_is_seen(dtype):
    model = make()
    with torch.no_grad():
        model.pos_embed.copy_(model.pos_embed.to(dtype))  # equal values in both
        model.position(grid())
        model.to(dtype)
        after = model.position(grid(dtype=dtype))
    assert after.dtype == dtype
    torch.testing.assert_close(after, resized(model.pos_embed.detach(), GRID))


def test_not_a_number_stays():
    model = make()
    with torch.no_grad():
        model.position(grid())
        model.pos_embed.fill_(torch.nan)
        assert model.position(grid()).isnan().all() and model.position(grid()).isnan().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_their_own(copied):
    model = make().eval()
    with torch.no_grad():
        kept = model.position(grid()).clone()
        other = copied(model)
        other.pos_embed.mul_(2)
        torch.testing.assert_close(other.position(grid()), 2 * kept)
        assert torch.equal(model.position(grid()), kept)
        assert list(other.state_dict()) == list(model.state_dict())


def test_few_sizes_are_kept_the_last_ones(calls):
    model = make()
    with torch.no_grad():
        for columns in [*range(5, 25), 24, 23, 22, 5]:
            model.position(grid(2, columns))
    assert calls == [(2, columns) for columns in [*range(5, 25), 5]]
    assert len(model._resized) <= 8


def test_an_inference_tensor_serves_training():
    model = make()
    with torch.inference_mode():
        model.position(grid())
    with torch.no_grad():
        assert model.position(grid()).shape == (1, *GRID, 6)
    sum(out.sum() for out in model(torch.zeros(1, 3, 48, 80))).backward()
    assert model.pos_embed.grad.any()


def test_fake_and_meta_tensors_leave_nothing_behind():
    model = make().eval()
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(model.position(grid()), FakeTensor)
        assert not model._resized
        assert type(model.position(grid())) is torch.Tensor
        meta = make().to("meta")
        assert meta.position(grid().to("meta")).device.type == "meta" and not meta._resized


@pytest.mark.parametrize("first", [True, False])
def test_autocast_leaves_nothing_behind(first):
    """What is kept in autocast serves without, and the other way round."""
    model = build(ELSAVolo).bfloat16().eval()
    image = torch.randn(1, 3, 48, 80, dtype=torch.bfloat16)
    with torch.no_grad():
        for enabled in (first, not first):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                position = model.position(grid(dtype=torch.bfloat16))
                assert torch.equal(position, build_position(model)) and model(image)
    assert position.dtype == torch.bfloat16


def build_position(model):
    return elsa_core.volo.resize_position(model.pos_embed, GRID)


def test_many_threads():
    """More sizes than are kept, so that threads drop what others use."""
    model = make().eval()
    sizes = [(2, columns) for columns in range(5, 25)]
    expected = [resized(model.pos_embed.detach(), size) for size in sizes]

    @torch.no_grad()
    def work(index):
        return model.position(grid(*sizes[index % len(sizes)]))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(400)))
    for index, result in enumerate(results):
        torch.testing.assert_close(result, expected[index % len(sizes)])
    assert len(model._resized) <= 8 + 8  # each thread may keep one more


def test_load_resizes_in_double_precision():
    """One rounding, to the embedding's own dtype."""
    position = torch.randn(1, 7, 5, 6, dtype=torch.float64)
    model = make().double()
    model.load_state_dict({**model.state_dict(), "pos_embed": position})
    torch.testing.assert_close(model.pos_embed, resized(position, (4, 4)), rtol=0, atol=1e-12)
    model.half().load_state_dict({**model.state_dict(), "pos_embed": position.half()})
    expected = resized(position.half().double(), (4, 4)).half()
    torch.testing.assert_close(model.pos_embed, expected, rtol=2**-11, atol=0)


def test_load_into_a_model_without_memory():
    with torch.device("meta"):
        model = make()
    state = make().state_dict()
    position = state["pos_embed"] = torch.randn(1, 7, 5, 6)
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(model.pos_embed, resized(position, (4, 4)))
    assert all(out.isfinite().all() for out in model(torch.randn(1, 3, 32, 48)))


@pytest.mark.parametrize("name", ["pos_embed", "norm3.weight"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (0, 2)])
def test_what_is_no_tensor_is_reported(name, out_indices):
    """An entry of another kind is neither resized nor dropped in silence, built or not."""
    model = build(ELSAVolo, arch=make().arch, out_indices=out_indices)
    with pytest.raises(RuntimeError, match=name):
        model.load_state_dict({**make().state_dict(), name: "text"})
