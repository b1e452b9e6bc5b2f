"""torch.compile and torch.export of the whole backbone: one graph, for every size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from elsa_core import ELSASwin, elsa_attention
from elsa_core.layers import ELSA

ARCH = {"embed_dim": 12, "num_heads": [1, 2], "group_width": 4}


def make_model(depths=(1, 1), **options):
    torch.manual_seed(0)
    return ELSASwin({**ARCH, "depths": depths}, out_indices=(0, 1), **options)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def outputs_and_gradients(model, image):
    model.zero_grad()
    outs = model(image)
    sum(out.square().sum() for out in outs).backward()
    return [*outs, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"with_cp": True}, {"drop_path_rate": 0.3, "drop_rate": 0.1}], ids=str
)
def test_training_without_graph_break(options):
    model = make_model(**options).double()  # compiled, float32 rounds in another order
    image = torch.randn(2, 3, 40, 36, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = outputs_and_gradients(compiled, image)
    if "drop_path_rate" in options:  # other random numbers: only finite
        assert all(result.isfinite().all() for result in results)
        return
    expected = outputs_and_gradients(model, image)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_in_autocast_without_graph_break():
    model = make_model()
    image = torch.randn(1, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(image), model(image), rtol=0.05, atol=0.05)


def test_attention_dropout_without_graph_break():
    layer = ELSA(12, 3, 3, 4, attn_drop=0.5)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(1, 5, 6, 12))
    out.sum().backward()
    assert layer.ghost_head.grad.isfinite().all()


@pytest.mark.slow
def test_one_compilation_for_every_size():
    """Inference: the first size, then once more for all the others."""
    model = make_model().eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for height, width in [(64, 64), (72, 88), (65, 79), (90, 70), (112, 168), (101, 83)]:
            image = torch.randn(1, 3, height, width)
            torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3


def export(model, strict=False):
    """Of two images with odd sides, for every size whose last map is larger than 1x1."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
    return torch.export.export(
        model, (torch.randn(2, 3, 97, 131),), dynamic_shapes=shapes, strict=strict
    )


# The last map is 7x7, one window; twice and four times as large; and of other sizes.
SHAPES = [(1, 56, 56), (3, 112, 112), (1, 224, 224), (2, 64, 96), (1, 97, 131), (3, 9, 10)]


@pytest.mark.slow
@pytest.mark.parametrize("always_shift", [True, False])
def test_export_with_dynamic_size(always_shift):
    model = make_model((1, 2), always_shift=always_shift).eval()
    with torch.no_grad():
        program = export(model)
        names = {str(node.target) for node in program.graph.nodes}
        assert "elsa.attention.default" in names
        for batch, *size in SHAPES:
            image = torch.randn(batch, 3, *size)
            torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_training_graph(strict):
    model = make_model((1, 2))
    exported = export(model, strict).module()
    for batch, *size in SHAPES[:5]:
        image = torch.randn(batch, 3, *size)
        results = outputs_and_gradients(exported, image)
        torch.testing.assert_close(
            results, outputs_and_gradients(model, image), rtol=1e-4, atol=1e-4
        )


def test_inductor():
    """The default compiler: its code relies on the strides that the fake kernels promise."""

    def function(x, logits):
        return elsa_attention(x[..., 4:], logits, kernel_size=3).sigmoid()

    x, logits = torch.randn(1, 5, 6, 12), torch.randn(1, 5, 6, 18)
    # Its trials of the processor's vectors take half a minute.
    options = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    with torch.no_grad():
        result = torch.compile(function, fullgraph=True, options=options)(x, logits)
        torch.testing.assert_close(result, function(x, logits))


def test_function_transforms_are_refused_by_name():
    value, logits = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 9)

    def total(value):
        return elsa_attention(value, logits, kernel_size=3).square().sum()

    with pytest.raises(NotImplementedError, match="elsa::attention.*double backward"):
        torch.autograd.functional.hessian(total, value)
