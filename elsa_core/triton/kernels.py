"""Triton kernels of the operator's sums over taps: the forward pass, the gradient of the values.

A program has a tile of ROWS x COLUMNS positions of one head. Sums are float32; nothing uses
atomics, and the order of every sum depends on sizes alone. Maps are given by their strides of
image, row and column, in numbers; neighbouring channels follow each other. Ghost filters are
float32, (K * K, C).
"""

# Annotations must stay objects: Triton looks for tl.constexpr among them.
import triton
import triton.language as tl

# Sizes that vary from image to image: no code of their own.
SIZES = ["height", "width", "heads", "dilation"]


@triton.jit
def _place(height, width, heads, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Return image, head, rows and columns of this program's tile; heads change fastest."""
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, ROWS)
    image = (tile // (across * down)).to(tl.int64)
    position = tl.arange(0, ROWS * COLUMNS)
    y = tile // across % down * ROWS + position // COLUMNS
    x = tile % across * COLUMNS + position % COLUMNS
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    return image, head, y, x


@triton.jit
def known_channels(channel, DEPTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Return which channels of a block a head has; where it has all, as a constant."""
    if DEPTH % CHANNELS == 0:
        known = tl.full((CHANNELS,), True, tl.int1)
    else:
        known = channel < DEPTH
    return known


@triton.jit
def softmax_of(logits, TAPS: tl.constexpr):
    """Return the maximum of a position's logits and the reciprocal of the sum of exponentials.

    ``logits`` points to the first tap of each position.
    """
    largest = tl.load(logits).to(tl.float32)
    for tap in range(1, TAPS):
        largest = tl.maximum(largest, tl.load(logits + tap).to(tl.float32))
    total = tl.zeros(largest.shape, tl.float32)
    for tap in range(TAPS):
        total += tl.exp(tl.load(logits + tap).to(tl.float32) - largest)
    return largest, 1.0 / total


@triton.jit
def _add_tap(
    total,
    attention,
    window,
    ghost_add,
    ghost_mul,
    filters,
    known,
    ADD: tl.constexpr,
    MUL: tl.constexpr,
):
    """Return the sum with a tap's pixels, weighted by attention, then by filters."""
    attended = attention[:, None] * window
    if MUL:
        attended *= tl.load(ghost_mul + filters, mask=known, other=0.0)[None, :]
    total += attended
    if ADD:
        total += tl.load(ghost_add + filters, mask=known, other=0.0)[None, :] * window
    return total


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    value,
    logits,
    ghost_add,
    ghost_mul,
    out,
    height,
    width,
    heads,
    dilation,
    value_image,
    value_row,
    value_column,
    logits_image,
    logits_row,
    logits_column,
    KERNEL: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ADD: tl.constexpr,
    MUL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out (B, H, W, C), contiguous: axis 1 of the grid has the blocks of CHANNELS of a head."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    image, head, y, x = _place(height, width, heads, ROWS, COLUMNS, WIDE)
    inside = (y < height) & (x < width)
    within = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = known_channels(within, DEPTH, CHANNELS)
    channel = head * DEPTH + within
    of_logits = logits + image * logits_image + head * TAPS
    # Outside of the map they are those of a position at its border.
    of_logits += tl.minimum(y, height - 1) * logits_row + tl.minimum(x, width - 1) * logits_column
    largest, scale = softmax_of(of_logits, TAPS)
    value += image * value_image
    total = tl.zeros((ROWS * COLUMNS, CHANNELS), tl.float32)
    for ky in range(KERNEL):
        row = y + (ky - KERNEL // 2) * dilation
        in_row = inside & (row >= 0) & (row < height)
        for kx in range(KERNEL):
            tap = ky * KERNEL + kx
            column = x + (kx - KERNEL // 2) * dilation
            taken = in_row & (column >= 0) & (column < width)
            pixels = value + row * value_row + column * value_column
            window = tl.load(
                pixels[:, None] + channel[None, :], mask=taken[:, None] & known[None, :], other=0.0
            ).to(tl.float32)
            logit = tl.load(of_logits + tap).to(tl.float32)
            attention = tl.exp(logit - largest) * scale
            filters = tap * heads * DEPTH + channel
            total = _add_tap(
                total, attention, window, ghost_add, ghost_mul, filters, known, ADD, MUL
            )
    pixel = (image * height + y) * width + x
    to = out + (pixel * heads * DEPTH)[:, None] + channel[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside[:, None] & known[None, :])


@triton.jit(do_not_specialize=SIZES)
def value_kernel(
    grad,
    logits,
    softmax,
    ghost_add,
    ghost_mul,
    grad_value,
    height,
    width,
    heads,
    dilation,
    grad_image,
    grad_row,
    grad_column,
    logits_image,
    logits_row,
    logits_column,
    KERNEL: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ADD: tl.constexpr,
    MUL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradient of the values, contiguous: each position asks all positions whose taps read it."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    image, head, y, x = _place(height, width, heads, ROWS, COLUMNS, WIDE)
    inside = (y < height) & (x < width)
    within = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = known_channels(within, DEPTH, CHANNELS)
    channel = head * DEPTH + within
    grad += image * grad_image
    logits += image * logits_image + head * TAPS
    softmax += 2 * (image * height * width * heads + head)
    total = tl.zeros((ROWS * COLUMNS, CHANNELS), tl.float32)
    for ky in range(KERNEL):
        row = y - (ky - KERNEL // 2) * dilation
        in_row = inside & (row >= 0) & (row < height)
        for kx in range(KERNEL):
            tap = ky * KERNEL + kx
            column = x - (kx - KERNEL // 2) * dilation
            taken = in_row & (column >= 0) & (column < width)
            pixels = grad + row * grad_row + column * grad_column
            window = tl.load(
                pixels[:, None] + channel[None, :], mask=taken[:, None] & known[None, :], other=0.0
            ).to(tl.float32)
            reader = softmax + 2 * heads * (row * width + column)
            largest = tl.load(reader, mask=taken, other=0.0)
            scale = tl.load(reader + 1, mask=taken, other=0.0)
            logit = tl.load(
                logits + row * logits_row + column * logits_column + tap, mask=taken, other=0.0
            ).to(tl.float32)
            attention = tl.exp(logit - largest) * scale
            filters = tap * heads * DEPTH + channel
            total = _add_tap(
                total, attention, window, ghost_add, ghost_mul, filters, known, ADD, MUL
            )
    pixel = (image * height + y) * width + x
    to = grad_value + (pixel * heads * DEPTH)[:, None] + channel[None, :]
    tl.store(to, total.to(grad_value.dtype.element_ty), mask=inside[:, None] & known[None, :])
