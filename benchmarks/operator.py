"""Times the operator at the stage shapes of the published models, against alternatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from elsa_core import VARIANTS, VOLO_VARIANTS, elsa_attention

from .clock import Clock, Run
from .measure import Row, compare, copy, product

KERNEL = 7
VOLO_KERNEL = 5  # which has both ghost filters
# Image sizes (height, width), and the two shapes of the project's targets.
IMAGES = [(224, 224), (512, 512), (800, 1344)]
HEADLINES = [(100, 152, 96, 3), (50, 76, 384, 12)]
VOLO_SIDES = [224, 448, 512]  # of square images
Shape = tuple[int, int, int, int]  # height, width, channels, heads


def stage_shapes() -> Iterator[Shape]:
    """Yields the shapes of all ELSA stages of T (S has the same) and B, largest maps last."""
    found = set()
    for arch, (height, width) in itertools.product(VARIANTS.values(), IMAGES):
        for stage, heads in enumerate(arch.num_heads[:-1]):
            stride = 4 * 2**stage
            found.add((height // stride, width // stride, arch.embed_dim * 2**stage, heads))
    yield from sorted(found)


def volo_shapes(variants: Sequence[str]) -> Iterator[Shape]:
    """Yields the shapes of the ELSA stage of those ELSA-VOLOs, largest maps last."""
    archs = [VOLO_VARIANTS[name] for name in variants]
    for side in VOLO_SIDES:
        widths = sorted({(arch.embed_dims[0], arch.num_heads[0]) for arch in archs})
        yield from ((side // 8, side // 8, *width) for width in widths)


def case_of(shape: Shape, batch: int) -> str:
    """Returns a shape as the tables name it."""
    maps = "" if batch == 1 else f", batch {batch}"
    return f"{shape[0]}x{shape[1]}x{shape[2]} {shape[3]} heads{maps}"


def unfold_path(
    value: Tensor, logits: Tensor, ghost_add: Tensor, ghost_mul: Tensor | None = None
) -> Tensor:
    """Computes the operator with F.unfold, which copies every K*K neighbourhood.

    Channels come first: value [B, C, H, W], logits [B, G * K * K, H, W], ghost filters
    [C, K, K] -> [B, C, H, W].
    """
    batch, channels, height, width = value.shape
    kernel = ghost_add.shape[-1]
    taps = kernel**2
    heads = logits.shape[1] // taps
    patches = F.unfold(value, kernel, padding=kernel // 2)
    patches = patches.view(batch, heads, channels // heads, taps, height * width)
    attention = logits.view(batch, heads, 1, taps, height * width).softmax(3)
    filters = 1, heads, channels // heads, taps, 1
    if ghost_mul is not None:
        attention = attention * ghost_mul.view(filters)
    weights = attention + ghost_add.view(filters)
    return (weights * patches).sum(3).view(batch, channels, height, width)


def unfold_bytes(shape: Shape, batch: int, dtype: torch.dtype, kernel: int = KERNEL) -> int:
    """Returns the approximate peak memory of the unfold path's forward and backward, in bytes."""
    height, width, channels, _ = shape
    return 5 * batch * height * width * channels * kernel**2 * dtype.itemsize


def machine_limits(
    shape: Shape, batch: int, device: torch.device, dtype: torch.dtype, kernel: int = KERNEL
) -> dict[str, tuple[Run, ...]]:
    """Returns lower bounds on the time of any kernel: a copy of the bytes that the operator must
    read and write, and a square matrix product of as many multiply-adds; forward, and with
    backward."""
    height, width, channels, heads = shape
    positions = batch * height * width
    value, logits = positions * channels, positions * heads * kernel**2
    # The backward pass reads a gradient beside the inputs and writes two.
    numbers = 2 * value + logits, 5 * value + 3 * logits
    # For each tap and channel one for the attention and one for the filter; then one for the
    # gradients of the logits and of the filter each, and two for that of the values. The filter
    # that multiplies (of VOLO_KERNEL) takes no more: none forward, but one for its gradient and one
    # for that of the logits.
    more = 2 if kernel == VOLO_KERNEL else 0
    products = 2 * value * kernel**2, (6 + more) * value * kernel**2

    copies = tuple(copy(count // 2, device, dtype) for count in numbers)
    squares = tuple(product(round(count ** (1 / 3)), device, dtype) for count in products)
    return {"copy of as many bytes": copies, "product of as many FMAs": squares}


def _contenders(
    shape: Shape,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    memory: int,
    compiled: bool,
    kernel: int = KERNEL,
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor], Tensor]]:
    """Returns {name: (function, inputs, gradient of the output)}, each in its native layout."""
    height, width, channels, heads = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype).requires_grad_()

    filters = [draw(channels, kernel, kernel) for _ in range(1 + (kernel == VOLO_KERNEL))]
    taps = heads * kernel**2
    last = [draw(batch, height, width, channels), draw(batch, height, width, taps), *filters]
    first = [draw(batch, channels, height, width), draw(batch, taps, height, width), *filters]

    def elsa(*inputs: Tensor) -> Tensor:
        return elsa_attention(*inputs, kernel_size=kernel)

    found = {"elsa": (elsa, last, torch.randn_like(last[0]))}
    if unfold_bytes(shape, batch, dtype, kernel) < memory:
        found["unfold"] = (unfold_path, first, torch.randn_like(first[0]))
        if compiled:
            fused = torch.compile(unfold_path, dynamic=False)
            found["torch.compile of unfold"] = (fused, first, torch.randn_like(first[0]))
    if find_spec("natten"):
        import natten

        qkv = [draw(batch, height, width, heads, channels // heads) for _ in range(3)]

        def na2d(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return natten.na2d(query, key, value, kernel_size=kernel)

        found["natten na2d"] = (na2d, qkv, torch.randn_like(qkv[0]))
    return found


def measure_operator(
    clock: Clock,
    dtype: torch.dtype,
    batch: int,
    quick: bool,
    memory: int,
    rounds: int,
    seconds: float,
    volos: Sequence[str] = (),
) -> list[Row]:
    """Times forward, and forward with backward, at every shape: of those ELSA-VOLOs, if there are
    any, else of ELSA-Swin.

    On the CPU, torch.compile runs at the headline shapes only: it takes up to a minute for each.
    """
    shapes = list(volo_shapes(volos)) or HEADLINES
    if not (quick or volos):
        shapes = [*shapes, *stage_shapes()]
    kernel = VOLO_KERNEL if volos else KERNEL
    rows: list[Row] = []
    for shape in shapes:
        torch._dynamo.reset()
        compiled = clock.device.type == "cuda" or shape in HEADLINES
        forward: dict[str, Run] = {}
        both: dict[str, Run] = {}
        how = shape, batch, clock.device, dtype
        for name, parts in _contenders(*how, memory, compiled, kernel).items():
            forward[name] = lambda parts=parts: _forward(*parts)
            both[name] = lambda parts=parts: _both(*parts)
        for name, limits in machine_limits(*how, kernel).items():
            forward[name], both[name] = limits
        case = case_of(shape, batch)
        rows += compare("operator", case, "forward", forward, clock, rounds, seconds)
        rows += compare("operator", case, "forward+backward", both, clock, rounds, seconds)
    return rows


def _forward(function: Callable[..., Tensor], inputs: list[Tensor], _: Tensor) -> None:
    with torch.no_grad():
        function(*inputs)


def _both(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(function(*inputs), inputs, grad)
