"""Random calls of the operator: a right value, or one sentence that says what is wrong.

Values and gradients are compared with the reference in double precision. What the arguments must be
like is spelled out here anew (``is_valid``), not asked of the code under test.
"""

import contextlib
import random
import threading
import warnings

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from elsa_core import _fallback, elsa_attention, elsa_attention_reference

torch.set_num_threads(1)
warnings.simplefilter("ignore")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ODD_DTYPES = [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8]
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-11, torch.bfloat16: 6e-2, torch.float16: 8e-3}
MOST = 2**31 - 1
HUGE = [2**20, 2**28, MOST // 2, MOST, 2**31, 2**32 + 1, 2**40, 2**58, 2**61, 2**62, 2**63 - 1]
ODD_INTEGERS = [0, -1, -3, -(2**31), -(2**63), 2, 4]
OWN = ("elsa_attention needs", "elsa_attention: no memory")
# What PyTorch says before the operator is reached, or of a transform that has no rule for it.
OF_TORCH = ("functorch transforms", "forward-mode", "Overflow when unpacking", "can't allocate")
OF_TORCH += ("floating point dtype can require gradients", "a single memory location")


class Call:
    """Arguments of one call, drawn from a seed."""

    def __init__(self, rng):
        self.rng = rng
        self.generator = torch.Generator().manual_seed(rng.getrandbits(40))
        self.kernel = self.some([1, 3, 3, 5, 5, 7, 7, 9, 13], 0.06, [*ODD_INTEGERS, *HUGE, 31, 77])
        self.dilation = self.some([1, 1, 1, 2, 3, 8, 41], 0.25, [*ODD_INTEGERS, *HUGE])
        self.dtype = rng.choice(DTYPES)
        size = [rng.randint(1, 2), rng.randint(1, 20), rng.randint(1, 21)]
        if rng.random() < 0.1:
            size[rng.randrange(3)] = 0
        if rng.random() < 0.1:
            size = [1, 1, 1]
        heads = rng.randint(1, 3)
        channels = heads * rng.choice([1, 3, 8, 16, 17, 32])
        side = self.kernel if 0 < self.kernel < 100 else 3
        filters = (channels, side, side)
        self.tensors = [
            self.tensor(*size, channels),
            self.tensor(*size, heads * side**2),
            self.tensor(*filters) if rng.random() < 0.6 else None,
            self.tensor(*filters) if rng.random() < 0.4 else None,
        ]
        if rng.random() < 0.2:
            self.spoil()

    def some(self, usual, share, others):
        return self.rng.choice(others if self.rng.random() < share else usual)

    def tensor(self, *size):
        rng = self.rng
        numbers = torch.randn(*size, generator=self.generator, dtype=torch.float64).to(self.dtype)
        layout = rng.choice("plain plain reversed slice offset step expanded broadcast odd".split())
        if layout == "reversed":
            order = tuple(reversed(range(numbers.dim())))
            return numbers.permute(order).contiguous().permute(order)
        if layout == "slice":
            return torch.cat([numbers, numbers], -1)[..., size[-1] :]
        if layout == "offset":
            flat = torch.cat([numbers.new_zeros(rng.randint(1, 5)), numbers.flatten()])
            return flat[-numbers.numel() :].view(size) if numbers.numel() else numbers
        if layout == "step":
            axis = rng.randrange(len(size))
            index = (slice(None),) * axis + (slice(None, None, 2),)
            return numbers.repeat_interleave(2, axis)[index]
        if layout in ("expanded", "broadcast") and numbers.numel():
            axes = range(len(size)) if layout == "broadcast" else [rng.randrange(len(size))]
            for axis in axes:
                numbers = numbers.narrow(axis, 0, 1)
            return numbers.expand(size)
        if layout == "odd":
            strides = [7919 if n == 1 else s for n, s in zip(size, numbers.stride(), strict=True)]
            return numbers.as_strided(size, strides)
        return numbers

    def spoil(self):
        """One tensor becomes another's type, layout, device, shape, or far larger than memory."""
        place = self.rng.choice([i for i, tensor in enumerate(self.tensors) if tensor is not None])
        tensor = self.tensors[place]
        axis = self.rng.randrange(tensor.dim())
        one = tensor.flatten()[:1] if tensor.numel() else tensor.new_zeros(1)
        size = list(tensor.shape)
        size[axis] = self.rng.choice([2**20, 2**31, 2**40])
        self.tensors[place] = self.rng.choice(
            [
                lambda: tensor.real.to(self.rng.choice(ODD_DTYPES)),
                lambda: tensor.to(self.rng.choice(DTYPES)),
                lambda: tensor.to("meta"),
                lambda: tensor.contiguous().to_sparse(),
                lambda: tensor.transpose(0, axis),
                lambda: tensor.unsqueeze(axis),
                lambda: tensor.narrow(axis, 0, tensor.shape[axis] // 2),
                lambda: torch._neg_view(tensor),
                lambda: one.as_strided(size, (0,) * len(size)),
            ]
        )()

    def is_valid(self):
        value, logits, *ghosts = self.tensors
        kernel, dilation = self.kernel, self.dilation
        if kernel < 1 or kernel % 2 == 0 or dilation < 1 or (kernel - 1) * dilation > MOST:
            return False
        present = [tensor for tensor in self.tensors if tensor is not None]
        if any(tensor.layout != torch.strided for tensor in present):
            return False
        kinds = {(tensor.dtype, tensor.device) for tensor in present}
        if len(kinds) != 1 or value.dtype not in DTYPES or value.dim() != 4 or logits.dim() != 4:
            return False
        heads, rest = divmod(logits.shape[3], kernel**2)
        if value.shape[:3] != logits.shape[:3] or rest or not heads or value.shape[3] % heads:
            return False
        filters = (value.shape[3], kernel, kernel)
        return value.shape[3] > 0 and all(
            ghost is None or ghost.shape == filters for ghost in ghosts
        )

    def is_large(self):
        """Whether refusing it for want of memory is right, and computing it takes too long."""
        sizes = [tensor.numel() for tensor in self.tensors if tensor is not None]
        value, logits = self.tensors[:2]
        return max(sizes) > 2**19 or value.shape[3] * self.kernel**2 > 2**22 or logits.dim() != 4

    def __str__(self):
        shapes = [t if t is None else (*t.shape, str(t.dtype)[6:]) for t in self.tensors]
        return f"K {self.kernel} dilation {self.dilation} {shapes}"


def of_value(call):
    """The operator as a function of its first argument."""
    options = {"kernel_size": call.kernel, "dilation": call.dilation}
    return lambda value: elsa_attention(value, *call.tensors[1:], **options)


def forward(call):
    with torch.no_grad():
        return [of_value(call)(call.tensors[0])]


def dispatched(call):
    with torch.inference_mode():
        return [torch.ops.elsa.attention(*call.tensors, call.kernel, call.dilation)]


def backward(call):
    tensors = [t if t is None else t.detach().requires_grad_() for t in call.tensors]
    out = elsa_attention(*tensors, kernel_size=call.kernel, dilation=call.dilation)
    wanted = [tensor for tensor in tensors if tensor is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream(out))]


def default_kernels(call):
    out = _fallback.attention(*call.tensors, call.kernel, call.dilation)
    grads = _fallback.attention_backward(upstream(out), *call.tensors, call.kernel, call.dilation)
    return [out, *(g for g, t in zip(grads, call.tensors, strict=True) if t is not None)]


def threads(call):
    torch.set_num_threads(call.rng.choice([2, 3, 8, 31]))
    return backward(call)


def threads_of_python(call):
    results, errors = [], []

    def run():
        try:
            results.append(backward(call))
        except (ValueError, TypeError, RuntimeError) as error:
            errors.append(error)

    # After a fork, PyTorch makes its thread pool anew, and two threads at once end in an assertion.
    torch.set_num_threads(1)
    workers = [threading.Thread(target=run) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    first, *others = results
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return first


def vmapped(call):
    return [torch.vmap(of_value(call))(torch.stack([call.tensors[0]] * 2))[1]]


def traced(call):
    graph = make_fx(of_value(call))(call.tensors[0])
    return [graph(call.tensors[0])]


def meta(call):
    """The shapes that the fake kernels give, with the numbers of the compiled ones."""
    tensors = [t if t is None else t.to("meta") for t in call.tensors]
    fake = torch.ops.elsa.attention(*tensors, call.kernel, call.dilation)
    others = torch.ops.elsa.attention_backward(fake, *tensors, call.kernel, call.dilation)
    results = backward(call)
    wanted = [g for g, t in zip(others, tensors, strict=True) if t is not None]
    for result, shape in zip(results, [fake, *wanted], strict=True):
        assert result.shape == shape.shape and result.dtype == shape.dtype, (result.shape, shape)
    return results


def forward_mode(call):
    value = call.tensors[0]
    torch.func.jvp(of_value(call), (value,), (torch.ones_like(value),))
    raise AssertionError("a tangent is lost")


def function_gradient(call):
    attention = of_value(call)
    torch.func.grad(lambda value: attention(value).sum())(call.tensors[0])
    raise AssertionError("a gradient without a rule")


WAYS = [forward, dispatched, backward, backward, default_kernels, threads, threads_of_python]
WAYS += [vmapped, traced, meta, forward_mode, function_gradient]
WITHOUT_VALUE = (forward_mode, function_gradient)


def upstream(out):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


def exact(call):
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in call.tensors]
    out = elsa_attention_reference(*doubles, kernel_size=call.kernel, dilation=call.dilation)
    if call.kernel > 13:  # whose gradients take PyTorch seconds, even of one pixel
        return [out.detach()]
    wanted = [tensor for tensor in doubles if tensor is not None]
    grad = upstream(call.tensors[0]).double()
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def warm_up():
    """Imports what PyTorch imports late, once for all cases."""
    usual = Call(random.Random(0))
    usual.kernel, usual.dilation, usual.dtype = 3, 1, torch.float32
    usual.tensors = [torch.ones(1, 2, 2, 1), torch.ones(1, 2, 2, 9), None, None]
    for way in WAYS:
        if way not in (threads, threads_of_python):
            with contextlib.suppress(RuntimeError, AssertionError):
                way(usual)


def case(seed):
    rng = random.Random(seed)
    call = Call(rng)
    way = rng.choice(WAYS)
    print(way.__name__, call)
    valid, large = call.is_valid(), call.is_large()
    if valid and large and way in (default_kernels, traced):
        return  # plain PyTorch may take what there is
    try:
        results = way(call)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        text = str(error)
        if valid and way in WITHOUT_VALUE and any(word in text for word in OF_TORCH):
            return
        if not valid and (text.startswith(OWN[0]) or any(word in text for word in OF_TORCH)):
            return
        if large and (text.startswith(OWN) or any(word in text for word in OF_TORCH)):
            return
        raise
    assert valid, "not refused"
    if large or call.tensors[0].device.type == "meta":
        return
    truths = exact(call)
    scale = max([1.0, *(t.abs().max().item() for t in truths if t.numel())])
    for result, truth in zip(results, truths, strict=False):
        assert result.dtype == call.tensors[0].dtype and result.shape == truth.shape
        error = (result.double() - truth).abs().max().item() if truth.numel() else 0
        assert error <= TOLERANCE[result.dtype] * scale, f"error {error}, largest number {scale}"


warm_up()
