"""What the operator's tests give to it and what they check, on every device."""

import torch

from elsa_core import elsa_attention, elsa_attention_reference

LOW = [torch.bfloat16, torch.float16]
SHORT_AXES = [(4, 5, 1), (1, 5, 1), (4, 1, 5), (4, 1, 1), (1, 1, 5), (1, 1, 1)]
"""Batch, height and width, of length 1 where strides mean nothing."""
GHOSTS = {"none": (), "add": ("add",), "mul": ("mul",), "both": ("add", "mul")}
SHAPES = {  # batch, height, width, channels, heads
    "one pixel": (1, 1, 1, 8, 2),
    "one head": (1, 5, 4, 12, 1),
    "odd": (2, 7, 11, 30, 3),
    "one channel a head": (1, 6, 5, 3, 3),
    "batch 0": (0, 4, 4, 8, 2),
    "height 0": (1, 0, 4, 8, 2),
}


def make_inputs(shape, kernel_size, ghosts=("add",), dtype=torch.float64, device="cpu", seed=0):
    """Value, logits and the ghost filters that ``ghosts`` names, else None; all want gradients.

    The numbers are the same on every device and, but for rounding, in every type.
    """
    batch, height, width, channels, heads = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        numbers = torch.randn(*size, generator=generator, dtype=torch.float64)
        return numbers.to(device, dtype).requires_grad_()

    filters = (channels, kernel_size, kernel_size)
    return [
        draw(batch, height, width, channels),
        draw(batch, height, width, heads * kernel_size**2),
        draw(*filters) if "add" in ghosts else None,
        draw(*filters) if "mul" in ghosts else None,
    ]


def changed(inputs, change):
    """The inputs, each changed and a leaf of its own."""
    return [None if t is None else change(t.detach()).requires_grad_() for t in inputs]


def with_constant_logits(inputs, kernel_size, number, step=1):
    """All logits are the number, but for the first head's middle tap, larger by the step."""
    logits = torch.full_like(inputs[1], number)
    logits[..., kernel_size**2 // 2] += step
    return [inputs[0], logits.detach().requires_grad_(), *inputs[2:]]


def with_odd_strides(tensor):
    """The same numbers in the same memory, with arbitrary strides where an axis has length 1."""
    sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
    odd = [stride if size != 1 else 1_000_003 + size for size, stride in sizes_and_strides]
    return tensor.as_strided(tensor.shape, odd)


def value_and_gradients(function, inputs, kernel_size=7, dilation=1, numbers=torch.float64):
    """The result, and the gradients for an upstream gradient of the numbers of that type."""
    out = function(*inputs, kernel_size=kernel_size, dilation=dilation)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(numbers).to(out)
    return [out, *torch.autograd.grad(out, [t for t in inputs if t is not None], grad)]


def assert_agrees(inputs, kernel_size=7, dilation=1, function=elsa_attention, double=1e-12):
    """Operator and its definition in double precision: the judge must not add errors of its own.

    Args:
        double: the tolerance for double precision, relative to the largest number.
    """
    options = (kernel_size, dilation, inputs[0].dtype)
    results = value_and_gradients(function, inputs, *options)
    exact = changed(inputs, torch.Tensor.double)
    expected = value_and_gradients(elsa_attention_reference, exact, *options)
    for result, reference in zip(results, expected, strict=True):
        scale = reference.abs().max().item() if reference.numel() else 0
        tolerance = (double if result.dtype == torch.float64 else 1e-5) * max(1, scale)
        torch.testing.assert_close(result, reference.to(result.dtype), rtol=0, atol=tolerance)


def assert_rounds_once(inputs, kernel_size, roundings=0.0):
    """At most twice the error of plain PyTorch in that precision, against double precision.

    Args:
        roundings: how many may be wrong where plain PyTorch has the exact number.
    """
    options = dict(kernel_size=kernel_size, numbers=inputs[0].dtype)
    exact = changed(inputs, torch.Tensor.double)
    exact = value_and_gradients(elsa_attention_reference, exact, **options)
    plain = value_and_gradients(elsa_attention_reference, inputs, **options)
    ours = value_and_gradients(elsa_attention, inputs, **options)
    for result, other, truth in zip(ours, plain, exact, strict=True):
        assert result.dtype == inputs[0].dtype
        rounding = torch.finfo(result.dtype).eps / 2 * truth.abs().max()
        error = (result - truth).abs().max()
        assert error <= max(2 * (other - truth).abs().max(), roundings * rounding)


def assert_strides_do_not_matter(inputs, kernel_size, offset):
    """Slices of wider maps, aligned or not, and maps in another order."""

    def restride(tensor):
        reverse = tuple(reversed(range(tensor.dim())))
        other = tensor.permute(reverse).contiguous().permute(reverse)
        assert not other.is_contiguous()
        return other

    def slice_of_channels(tensor):
        beside = torch.full_like(tensor[..., :1], float("nan"))
        wider = torch.cat([beside.expand(*beside.shape[:-1], offset), tensor, beside], -1)
        return wider[..., offset : offset + tensor.shape[-1]]

    expected = value_and_gradients(elsa_attention, inputs, kernel_size)
    for change in (slice_of_channels, restride):
        results = value_and_gradients(elsa_attention, changed(inputs, change), kernel_size)
        assert results[0].is_contiguous()
        assert all(map(torch.equal, results, expected))


def assert_strides_of_axes_of_length_1_mean_nothing(inputs, kernel_size):
    odd = changed(inputs, with_odd_strides)
    grad = torch.randn(inputs[0].shape).to(inputs[0])
    runs = []
    for tensors, upstream in ((inputs, grad), (odd, with_odd_strides(grad))):
        out = elsa_attention(*tensors, kernel_size=kernel_size)
        runs.append([out, *torch.ops.elsa.attention_backward(upstream, *tensors, kernel_size, 1)])
    for expected, result in zip(*runs, strict=True):
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()


def assert_frozen_filters_are_left_out(backward, inputs, kernel_size):
    inputs = [None if t is None else t.detach() for t in inputs]
    grad = torch.randn_like(inputs[0])
    whole, part = (backward(grad, *inputs, kernel_size, 1, wanted) for wanted in (True, False))
    assert all(map(torch.equal, part[:2], whole[:2]))
    assert [tensor.numel() for tensor in part[2:]] == [0, 0]


def assert_gradients_are_right(inputs, kernel_size, dilation):
    assert torch.autograd.gradcheck(
        lambda *tensors: elsa_attention(*tensors, kernel_size=kernel_size, dilation=dilation),
        inputs,
        fast_mode=True,
    )


def assert_registrations_are_right(inputs, kernel_size):
    """And results are contiguous as the fake kernels say: Inductor's code relies on the strides."""
    forward, backward = torch.ops.elsa.attention, torch.ops.elsa.attention_backward
    torch.library.opcheck(forward.default, (*inputs, kernel_size, 1))
    tensors = [None if t is None else t.detach() for t in inputs]
    grad = torch.ones_like(tensors[0])
    torch.library.opcheck(backward.default, (grad, *tensors, kernel_size, 1))
    grads = backward(grad, *tensors, kernel_size, 1)
    assert all(t.is_contiguous() for t in (forward(*tensors, kernel_size, 1), *grads))


def assert_autocast_computes_in_its_own_type(inputs, kernel_size, dtype):
    with torch.autocast(inputs[0].device.type, dtype=dtype):
        out = elsa_attention(inputs[0].to(dtype), *inputs[1:], kernel_size=kernel_size)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.float().sum(), inputs[:3])
    assert [grad.dtype for grad in grads] == [torch.float32] * 3


def assert_compiles_without_graph_break(inputs, kernel_size):
    compiled = torch.compile(elsa_attention, fullgraph=True, backend="aot_eager")
    results = value_and_gradients(compiled, inputs, kernel_size)
    assert all(map(torch.equal, results, value_and_gradients(elsa_attention, inputs, kernel_size)))
