"""ELSA-VOLO compiled, exported, in half precision and distributed."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from volo_models import ARCH, build, randomise

from elsa_core import ELSAVolo, ELSAVoloClassifier

SMALL = {**ARCH, "depths": (1, 1, 1, 1)}
KINDS = [(ELSAVolo, {}), (ELSAVolo, {"pyramid": True}), (ELSAVoloClassifier, {"num_classes": 5})]
IDS = ["native", "pyramid", "classifier"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def make(kind, **options):
    return randomise(build(kind, arch=SMALL, **options))


def image(*size, batch=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, *size, generator=generator)


def loss(outputs):
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return sum(output.float().square().mean() for output in outputs)


def outputs_and_gradients(model, x):
    model.zero_grad()
    outputs = model(x)
    loss(outputs).backward()
    return [*outputs, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "with_cp"), [(*KINDS[1], True), (*KINDS[2], False)], ids=IDS[1:]
)
def test_training_without_graph_break(kind, options, with_cp):
    """With MixToken, whose boxes are equal for the same seed."""
    model = make(kind, with_cp=with_cp, **options).double()
    x = image(40, 52).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        torch.manual_seed(2)
        results.append(outputs_and_gradients(function, x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_training_with_all_rates_without_graph_break():
    model = make(ELSAVoloClassifier, drop_path_rate=0.3, drop_rate=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert all(t.isfinite().all() for t in outputs_and_gradients(compiled, image(32, 48)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), KINDS[1:], ids=IDS[1:])
def test_one_compilation_for_every_size(kind, options):
    """Inference: the first size, then once more for the others, the position's own among them."""
    model = make(kind, **options).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for size in [(96, 96), (80, 112), (64, 64), (64, 79), (101, 60)]:
            torch.testing.assert_close(compiled(image(*size)), model(image(*size)))
    assert counter.frame_count <= 2


def export(model, strict=False):
    """For every size whose last map is larger than 1x1."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
    return torch.export.export(model, (image(97, 131),), dynamic_shapes=shapes, strict=strict)


# The first has the position's own size, the second its rows.
SIZES = [(1, 64, 64), (3, 64, 112), (1, 97, 131), (2, 33, 50)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "strict"),
    [(*KINDS[0], True), (*KINDS[1], False), (*KINDS[2], False)],
    ids=IDS,
)
def test_export_with_dynamic_size(kind, options, strict):
    model = make(kind, **options).eval()
    with torch.no_grad():
        program = export(model, strict).module()
        for batch, *size in SIZES:
            x = image(*size, batch=batch)
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_export_of_a_training_graph():
    model = make(ELSAVolo, pyramid=True, norm_eval=True)
    exported = export(model).module()
    for batch, *size in SIZES:
        x = image(*size, batch=batch)
        results = outputs_and_gradients(exported, x)
        expected = outputs_and_gradients(model, x)
        torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
@pytest.mark.parametrize("size", [(64, 64), (50, 90)])
def test_autocast_agrees_with_single_precision(kind, options, size):
    model, x = make(kind, **options).eval(), image(*size)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            results = model(x)
            again = model(x)
    if isinstance(results, torch.Tensor):
        results, again, expected = (results,), (again,), (expected,)
    for result, repeated, reference in zip(results, again, expected, strict=True):
        assert torch.equal(result, repeated) and result.isfinite().all()
        error = (result.float() - reference).abs().mean()
        assert 0 < error < 0.03 * reference.abs().mean()
    torch.testing.assert_close(model(x), expected[0] if kind is ELSAVoloClassifier else expected)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_training_under_autocast(kind, options):
    model = make(kind, with_cp=True, **options)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(image(50, 64))
    loss(outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_models_of_another_dtype(kind, options, dtype):
    model, x = make(kind, **options).eval(), image(48, 80)
    with torch.no_grad():
        expected = model(x)
        results = model.to(dtype)(x.to(dtype))
    if isinstance(results, torch.Tensor):
        results, expected = (results,), (expected,)
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == dtype
        error = (result.float() - reference).abs().mean() / reference.abs().mean()
        assert error < (1e-6 if dtype == torch.float64 else 0.03)
    model.train()
    loss(model(x.to(dtype))).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def distributed_model():
    return make(ELSAVolo, pyramid=True, with_cp=True, frozen_stages=0, out_indices=(0, 1, 3))


def work(rank, folder):
    """A step of one process of two; the gradients are written to a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    model = distributed_model()
    parallel = nn.parallel.DistributedDataParallel(model)
    for step in range(2):  # the second one refuses parameters that got no gradient in the first
        model.zero_grad()
        loss(parallel(image(48, 64, batch=4)[2 * rank : 2 * rank + 2] + step)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.save(gradients, f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    model = distributed_model()
    loss(model(image(48, 64, batch=4) + 1)).backward()
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
        expected = model.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5, msg=name)
