"""The choice of the operator's kernels: by default, by name, and a sentence where it is wrong."""

import functools
import os
import subprocess
import sys
import warnings

import pytest
import torch
from operator_inputs import (
    GHOSTS,
    LOW,
    assert_agrees,
    assert_rounds_once,
    make_inputs,
    value_and_gradients,
)

from elsa_core import (
    _fallback,
    backend_of,
    backends,
    elsa_attention,
    elsa_attention_reference,
    use_backend,
)

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_triton.py runs it in an interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="for the back ends that users have")


@pytest.fixture(autouse=True)
def same_choice_afterwards(monkeypatch):
    chosen = backends._chosen
    if not INTERPRETED:  # whatever ELSA_BACKEND says
        use_backend(None)
    yield
    monkeypatch.undo()  # a test may have hidden what was chosen
    use_backend(chosen)


@compiled
def test_compiled_kernels_come_first():
    assert backends.backends_of(CPU) == ["cpu", "torch"]
    assert backend_of(CPU) == backend_of("cpu") == "cpu"


@compiled
def test_gpus_without_compiled_kernels_use_triton():
    pytest.importorskip("triton")
    if backends.has_kernels("cuda"):
        pytest.skip("the extension has CUDA kernels")
    for name in ("elsa::attention", "elsa::attention_backward"):
        for key in ("CUDA", "XPU"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    assert backend_of(torch.device("cuda")) == ("triton" if torch.cuda.is_available() else "torch")
    with use_backend("torch"):
        assert backends._kernels_in_python(torch.device("cuda"), torch.float32) is _fallback


@compiled
def test_a_name_chooses_until_it_is_taken_back():
    tensors = [None if t is None else t.detach() for t in make_inputs((1, 9, 8, 64, 2), 7)]
    ours, plain = elsa_attention(*tensors, kernel_size=7), _fallback.attention(*tensors, 7, 1)
    assert not torch.equal(ours, plain)
    with use_backend("torch"):
        assert backend_of(CPU) == "torch"
        assert torch.equal(elsa_attention(*tensors, kernel_size=7), plain)
        with use_backend(None):
            assert torch.equal(elsa_attention(*tensors, kernel_size=7), ours)
        assert torch.equal(elsa_attention(*tensors, kernel_size=7), plain)
    assert torch.equal(elsa_attention(*tensors, kernel_size=7), ours)
    use_backend("torch")
    assert torch.equal(elsa_attention(*tensors, kernel_size=7), plain)


@compiled
def test_compiled_models_follow_the_choice():
    inputs = make_inputs((1, 9, 8, 64, 2), 7)
    function = torch.compile(elsa_attention, fullgraph=True, backend="aot_eager")
    value_and_gradients(function, inputs)
    with use_backend("torch"):
        results = value_and_gradients(function, inputs)
        assert all(map(torch.equal, results, value_and_gradients(elsa_attention, inputs)))


@compiled
def test_the_end_of_a_choice_takes_no_kernel_away():
    """Another thread may be about to enter it, and would do so in freed memory."""
    with use_backend("torch"):
        kernels = torch._C._dispatch_dump("elsa::attention")
    assert "CPU (inactive)" in kernels  # the compiled one
    assert torch._C._dispatch_dump("elsa::attention") == kernels


WRONG = {
    "another": (lambda: use_backend("vulkan"), ValueError, "must be cuda, triton or torch, got 'v"),
    "no kernels": (lambda: use_backend("cuda"), RuntimeError, "extension has no CUDA kernels"),
}


@compiled
@pytest.mark.parametrize("choose, error, sentence", WRONG.values(), ids=WRONG)
def test_a_wrong_name_changes_nothing(choose, error, sentence):
    if sentence.startswith("extension") and backends.has_kernels("cuda"):
        pytest.skip("the extension has CUDA kernels")
    with use_backend("torch"):
        with pytest.raises(error, match=sentence):
            choose()
        assert backend_of(CPU) == "torch"


@compiled
def test_triton_that_is_not_there_cannot_be_chosen(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton, which is not installed: choose cuda or torch"):
        use_backend("triton")


@compiled
def test_without_triton_a_gpu_has_plain_pytorch(monkeypatch):
    monkeypatch.setattr(backends, "has_kernels", lambda device_type: False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, backends._KERNELS, raising=False)
    monkeypatch.setattr(backends, "_tried", {})
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="in plain PyTorch .slower.*on cuda.*triton"):
        assert backends._kernels_in_python(torch.device("cuda"), torch.float32) is None


@compiled
def test_a_graph_capture_knows_the_trials_before_it(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_tried", {})
    gpu, number = torch.device("cuda:7"), torch.float32
    assert isinstance(before := backends._triton_kernels(gpu, number), str)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends._triton_kernels(gpu, number) == before
    backends._tried.clear()
    assert backends._triton_kernels(gpu, number) is sys.modules[backends._KERNELS]
    monkeypatch.setitem(sys.modules, backends._KERNELS, None)
    assert "triton" in backends._triton_kernels(gpu, number)


@compiled
def test_triton_that_does_not_work_is_said(monkeypatch):
    """Once; by name it is an error."""
    reason = "Failed to find C compiler"
    monkeypatch.setattr(backends, "_triton_kernels", lambda device, dtype: reason)
    backends._warn_once.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "has_kernels", lambda device_type: False)
    monkeypatch.setattr(backends, "GPUS", ("cpu",))
    inputs = [None if t is None else t.detach() for t in make_inputs((1, 4, 5, 8, 2), 3)]
    kernel = functools.partial(backends._follow("attention", None), None)
    with pytest.warns(RuntimeWarning, match=f"in plain PyTorch .slower.*on cpu.*float64 .{reason}"):
        out = kernel(*inputs, 3, 1)
    assert torch.equal(out, _fallback.attention(*inputs, 3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel(*inputs, 3, 1)
    monkeypatch.setattr(backends, "_chosen", "triton")
    with pytest.raises(RuntimeError, match=f"Triton does not work on cpu .*{reason}.*by name"):
        kernel(*inputs, 3, 1)


@compiled
def test_a_failing_trial_gives_its_reason():
    assert "meta" in str(backends._try_triton(torch.device("meta"), torch.float32)).lower()


ENVIRONMENT = {
    "torch": "torch",
    "": "cpu",
    "vulkan": "ELSA_BACKEND must be cuda, triton or torch, got 'vulkan'",
}


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("name, expected", ENVIRONMENT.items())
def test_the_environment_chooses(name, expected):
    program = "import torch, elsa_core; print(elsa_core.backend_of(torch.device('cpu')))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ELSA_BACKEND": name},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip() or done.stderr.strip().splitlines()[-1]).endswith(expected)


@interpreted
@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
def test_interpreter_has_nan_and_infinity_as_the_reference(ghosts):
    value, logits, add, mul = make_inputs((1, 6, 7, 8, 2), 3, ghosts, torch.float32)
    value, logits = value.detach().clone(), logits.detach().clone()
    value[0, 1, 1, 2] = torch.inf
    value[0, 4, 5, 3] = torch.nan
    logits[0, 3, 3, :9] = -torch.inf
    logits[0, 5, 0, 4] = torch.inf
    tensors = [t if t is None else t.detach().requires_grad_() for t in (value, logits, add, mul)]
    results = value_and_gradients(elsa_attention, tensors, 3)
    expected = value_and_gradients(elsa_attention_reference, tensors, 3)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@interpreted
@pytest.mark.parametrize("height, width", [(9, 2), (2, 9)])
def test_interpreter_has_dilations_beyond_a_side(height, width):
    inputs = make_inputs((1, height, width, 6, 2), 3, ("add", "mul"), torch.float32)
    assert_agrees(inputs, 3, 5)
    assert_agrees(inputs, 3, 2**30 - 1)


@interpreted
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_interpreter_sums_low_precision_in_float32(dtype):
    inputs = make_inputs((1, 4, 5, 64, 2), 7, ("add", "mul"), dtype)
    assert_rounds_once(inputs, 7, roundings=2)  # the interpreter cuts bfloat16 off


@interpreted
def test_interpreter_counts_in_64_bits(monkeypatch):
    from elsa_core.triton import operator

    inputs = make_inputs((2, 3, 5, 8, 2), 3, ("add", "mul"), torch.float32)
    expected = value_and_gradients(elsa_attention, inputs, 3, 2)
    monkeypatch.setattr(operator, "_MOST_NUMBERS", 0)
    assert all(map(torch.equal, value_and_gradients(elsa_attention, inputs, 3, 2), expected))
