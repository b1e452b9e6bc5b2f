"""ELSA-VOLO of any architecture against the same model with ELSA composed of its definition."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_elsa import naive_elsa
from volo_models import ARCH, build, randomise

from elsa_core import ELSAVolo

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def models(draw):
    """Options of a model whose widths need not divide each other."""
    heads = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    widths = draw(st.tuples(st.integers(3, 9), st.integers(1, 6)))
    arch = {
        "depths": (draw(st.integers(1, 2)), 1, 1, 1),
        "embed_dims": tuple(head * width for head, width in zip(heads, widths, strict=True)),
        "num_heads": heads,
        "mlp_ratio": draw(st.integers(1, 4)),
        "stem_dim": draw(st.integers(1, 5)),
        "kernel_size": draw(st.sampled_from([1, 3, 5, 7])),
        "group_width": draw(st.integers(1, 9)),
        "lam": draw(st.sampled_from([0, 1, 2])),
        "gamma": draw(st.sampled_from([0, 1, 0.5])),
        "qkv_bias": draw(st.booleans()),
        "qk_scale": draw(st.sampled_from([1.0, 0.5, -2.0])),
    }
    indices = draw(st.sets(st.integers(0, 3), min_size=1))
    return dict(
        arch=arch,
        pyramid=draw(st.booleans()),
        out_indices=sorted(indices),
        img_size=draw(st.integers(1, 48)),
        seed=draw(st.integers(0, 99)),
    )


def results(model, x, dtype):
    """The maps and the gradients of the image and the parameters."""
    model, x = model.to(dtype), x.to(dtype).requires_grad_()
    maps = model(x)
    inputs = [x, *model.parameters()]
    total = sum((m * torch.linspace(-1, 1, m.numel()).view(m.shape)).sum() for m in maps)
    return [*maps, *torch.autograd.grad(total, inputs)]


def of_definition(model):
    """The same model, whose ELSA layers are composed of their definition."""
    arch, model = model.arch, copy.deepcopy(model)
    dim_qk = math.ceil(arch.embed_dims[0] // 3 * 2 / arch.group_width) * arch.group_width
    for block in model.network[0]:
        options = dict(dim_qk=dim_qk, lam=arch.lam, gamma=arch.gamma, qk_scale=arch.qk_scale)
        block.attn.forward = partial(naive_elsa, block.attn, **options)
    return model


@SETTINGS
@given(models(), st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_any_architecture_is_its_definition(options, size):
    model = randomise(build(ELSAVolo, **options)).train()
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = results(of_definition(model), x, torch.float64)
    torch.testing.assert_close(results(model, x, torch.float64), expected, rtol=1e-8, atol=1e-8)


@SETTINGS
@given(models(), st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_single_precision_is_close_to_double(options, size):
    model = randomise(build(ELSAVolo, **options)).eval()
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = model(x)
        expected = of_definition(model).double()(x.double())
    for result, reference in zip(maps, expected, strict=True):
        error = (result - reference).abs().max()
        assert error <= 1e-3 * reference.abs().max().clamp(min=1)


@pytest.mark.parametrize("scale", [0.5, -3.0])
def test_scale_can_be_moved_into_the_convolution(scale):
    """So checkpoints convert exactly, whatever the original's scale was."""
    x = torch.randn(2, 3, 40, 50, dtype=torch.float64)
    plain = randomise(build(ELSAVolo)).double().eval()
    scaled = build(ELSAVolo, arch={**ARCH, "qk_scale": scale}).double().eval()
    scaled.load_state_dict(plain.state_dict())
    assert not torch.allclose(scaled(x)[0], plain(x)[0])
    for block in plain.network[0]:
        block.attn.attn[0].weight.data *= scale
    torch.testing.assert_close(scaled(x), plain(x), rtol=0, atol=1e-12)
