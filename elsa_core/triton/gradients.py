"""Triton kernels of the gradients of the logits and of the ghost filters; as in kernels.py."""

import triton
import triton.language as tl

from .kernels import SIZES, known_channels, softmax_of


@triton.jit
def _products(
    grad,
    value,
    ghost_mul,
    channels,
    inside,
    taken,
    distance,
    KERNEL: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    MUL: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Return the gradients times the values, summed over a head's channels: [COLUMNS, PIXELS].

    ``grad`` and ``value`` point to the first channel of positions and of pixels, ``ghost_mul`` to
    the filters of a row of taps, of which a pixel is the tap ``distance`` of a position.
    """
    products = tl.zeros(distance.shape, tl.float32)
    for first in range(0, DEPTH, CHANNELS):
        within = first + tl.arange(0, CHANNELS)
        known = known_channels(within, DEPTH, CHANNELS)
        upstream = tl.load(
            grad[:, None] + within[None, :], mask=inside[:, None] & known[None, :], other=0.0
        )
        pixels = tl.load(
            value[:, None] + within[None, :], mask=taken[:, None] & known[None, :], other=0.0
        )
        if WIDEN:
            upstream = upstream.to(tl.float32)
            pixels = pixels.to(tl.float32)
        if MUL:
            for kx in range(KERNEL):
                filters = tl.load(ghost_mul + kx * channels + within, mask=known, other=0.0)
                factor = upstream * filters[None, :]
                product = tl.dot(factor, tl.trans(pixels), input_precision="ieee")
                products += tl.where(distance == kx, product, 0.0)
        else:
            products = tl.dot(upstream, tl.trans(pixels), products, input_precision="ieee")
    return products


@triton.jit(do_not_specialize=SIZES)
def logits_kernel(
    grad,
    value,
    logits,
    ghost_mul,
    grad_logits,
    softmax,
    height,
    width,
    heads,
    dilation,
    grad_image,
    grad_row,
    grad_column,
    value_image,
    value_row,
    value_column,
    logits_image,
    logits_row,
    logits_column,
    KERNEL: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    MUL: tl.constexpr,
    WIDE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Gradient of the logits, contiguous, and the softmax for the kernels that follow.

    ``softmax`` (B, H, W, G, 2) gets the maximum of the logits and the reciprocal of the sum of
    their exponentials. A tile is COLUMNS positions of an image row, ``dilation`` apart: their taps
    in another row are a band in the matrix of these positions and 2 * COLUMNS pixels. WIDEN
    multiplies in float32.
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads
    apart = tl.minimum(dilation, width)
    across = tl.cdiv(tl.cdiv(width, apart), COLUMNS) * apart
    image = (tile // (across * height)).to(tl.int64)
    y = tile // across % height
    left = tile % across % apart + tile % across // apart * COLUMNS * apart
    position = tl.arange(0, COLUMNS)
    pixel = tl.arange(0, 2 * COLUMNS)
    x = left + position * apart
    column = left + (pixel - KERNEL // 2) * apart
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
        column = column.to(tl.int64)
    inside = x < width
    of_logits = logits + image * logits_image + y * logits_row + head * TAPS
    of_logits += tl.minimum(x, width - 1) * logits_column
    largest, scale = softmax_of(of_logits, TAPS)
    item = ((image * height + y) * width + x) * heads + head
    tl.store(softmax + 2 * item, largest, mask=inside)
    tl.store(softmax + 2 * item + 1, scale, mask=inside)

    distance = pixel[None, :] - position[:, None]
    of_grad = grad + image * grad_image + y * grad_row + x * grad_column + head * DEPTH
    of_value = value + image * value_image + column * value_column + head * DEPTH
    kx = tl.arange(0, SIZE)
    diagonal = position[:, None] + kx[None, :]
    asked = inside[:, None] & (kx < KERNEL)[None, :]
    of_row = of_logits[:, None] + kx[None, :]
    of_result = grad_logits + (item * TAPS)[:, None] + kx[None, :]
    dot = tl.zeros((COLUMNS,), tl.float32)
    # First the sum of attention times its gradient, then the result, with the products again.
    for step in range(2 * KERNEL):
        ky = step % KERNEL
        row = y + (ky - KERNEL // 2) * dilation
        limit = tl.where((row >= 0) & (row < height), width, 0)
        of_mul = ghost_mul
        if MUL:
            of_mul += (ky * KERNEL * heads + head) * DEPTH
        products = _products(
            of_grad,
            of_value + row * value_row,
            of_mul,
            heads * DEPTH,
            inside,
            (column >= 0) & (column < limit),
            distance,
            KERNEL,
            DEPTH,
            CHANNELS,
            MUL,
            WIDEN,
        )
        products = tl.gather(products, diagonal, 1)
        logit = tl.load(of_row + ky * KERNEL, mask=asked, other=0.0).to(tl.float32)
        attention = tl.exp(logit - largest[:, None]) * scale[:, None]
        if step < KERNEL:
            dot += tl.sum(tl.where(asked, attention * products, 0.0), 1)
        else:
            result = attention * (products - dot[:, None])
            to = of_result + ky * KERNEL
            tl.store(to, result.to(grad_logits.dtype.element_ty), mask=asked)


@triton.jit(do_not_specialize=[*SIZES, "rows", "parts"])
def ghost_kernel(
    grad,
    value,
    logits,
    softmax,
    add_parts,
    mul_parts,
    height,
    width,
    heads,
    dilation,
    grad_image,
    grad_row,
    grad_column,
    value_image,
    value_row,
    value_column,
    logits_image,
    logits_row,
    logits_column,
    rows,
    parts,
    KERNEL: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    ADD: tl.constexpr,
    MUL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients of the ghost filters, (PARTS, K * K, C) in float32, each summed over a part.

    A part is some of the ``rows`` image rows. A program has one row of taps, in a tile
    [COLUMNS, SIZE, CHANNELS]: axis 0 of the grid has parts and heads, axis 1 blocks of channels,
    axis 2 rows of taps.
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    ky = tl.program_id(2)
    within = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = known_channels(within, DEPTH, CHANNELS)
    channel = head * DEPTH + within
    kx = tl.arange(0, SIZE)
    exists = kx < KERNEL
    add = tl.zeros((COLUMNS, SIZE, CHANNELS), tl.float32)
    mul = tl.zeros((COLUMNS, SIZE, CHANNELS), tl.float32)
    begin = (part.to(tl.int64) * rows // parts).to(tl.int32)
    end = ((part.to(tl.int64) + 1) * rows // parts).to(tl.int32)
    for index in range(begin, end):
        image = (index // height).to(tl.int64)
        y = index % height
        row = y + (ky - KERNEL // 2) * dilation
        limit = tl.where((row >= 0) & (row < height), width, 0)
        if WIDE:
            y = y.to(tl.int64)
            row = row.to(tl.int64)
        of_grad = grad + image * grad_image + y * grad_row
        of_value = value + image * value_image + row * value_row
        of_logits = logits + image * logits_image + y * logits_row + head * TAPS + ky * KERNEL
        of_softmax = softmax + 2 * ((image * height + y) * width * heads + head)
        for left in range(0, width, COLUMNS):
            x = left + tl.arange(0, COLUMNS)
            if WIDE:
                x = x.to(tl.int64)
            column = x[:, None] + ((kx - KERNEL // 2) * dilation)[None, :]
            asked = (x < width)[:, None] & exists[None, :]
            taken = asked & (column >= 0) & (column < limit)
            window = tl.load(
                (of_value + column * value_column)[:, :, None] + channel[None, None, :],
                mask=taken[:, :, None] & known[None, None, :],
                other=0.0,
            ).to(tl.float32)
            upstream = tl.load(
                (of_grad + x * grad_column)[:, None] + channel[None, :],
                mask=(x < width)[:, None] & known[None, :],
                other=0.0,
            ).to(tl.float32)
            product = upstream[:, None, :] * window
            if ADD:
                add += product
            if MUL:
                logit = tl.load(
                    (of_logits + x * logits_column)[:, None] + kx[None, :], mask=asked, other=0.0
                ).to(tl.float32)
                largest = tl.load(of_softmax + 2 * heads * x, mask=x < width, other=0.0)
                scale = tl.load(of_softmax + 2 * heads * x + 1, mask=x < width, other=0.0)
                attention = tl.exp(logit - largest[:, None]) * scale[:, None]
                # Taps beyond the map count, too: 0 times an attention of NaN.
                mul += tl.where(asked, attention, 0.0)[:, :, None] * product
    to = (part * TAPS + ky * KERNEL + kx)[:, None] * heads * DEPTH + channel[None, :]
    mask = exists[:, None] & known[None, :]
    if ADD:
        tl.store(add_parts + to, tl.sum(add, 0), mask=mask)
    if MUL:
        tl.store(mul_parts + to, tl.sum(mul, 0), mask=mask)
