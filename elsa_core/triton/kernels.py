"""Triton kernels of the operator: what a program computes.

A program has a tile of ROWS x COLUMNS positions of one head. Sums are float32; nothing uses
atomics, and the order of every sum depends on sizes alone. Maps are given by their strides of
image, row and column, in numbers; neighbouring channels follow each other. Ghost filters are
float32, (K * K, C).
"""

# Annotations must stay objects: Triton looks for tl.constexpr among them.
import triton
import triton.language as tl

# Sizes that vary from image to image: no code of their own.
_SIZES = ["height", "width", "heads", "dilation"]


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
def _known(channel, DEPTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Return which channels of a block a head has; where it has all, as a constant."""
    if DEPTH % CHANNELS == 0:
        known = tl.full((CHANNELS,), True, tl.int1)
    else:
        known = channel < DEPTH
    return known


@triton.jit
def _softmax(logits, TAPS: tl.constexpr):
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


@triton.jit(do_not_specialize=_SIZES)
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
    known = _known(within, DEPTH, CHANNELS)
    channel = head * DEPTH + within
    of_logits = logits + image * logits_image + head * TAPS
    # Outside of the map they are those of a position at its border.
    of_logits += tl.minimum(y, height - 1) * logits_row + tl.minimum(x, width - 1) * logits_column
    largest, scale = _softmax(of_logits, TAPS)
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
            attended = (tl.exp(logit - largest) * scale)[:, None] * window
            filters = tap * heads * DEPTH + channel
            if MUL:
                attended *= tl.load(ghost_mul + filters, mask=known, other=0.0)[None, :]
            total += attended
            if ADD:
                total += tl.load(ghost_add + filters, mask=known, other=0.0)[None, :] * window
    pixel = (image * height + y) * width + x
    to = out + (pixel * heads * DEPTH)[:, None] + channel[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside[:, None] & known[None, :])


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
        known = _known(within, DEPTH, CHANNELS)
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


@triton.jit(do_not_specialize=_SIZES)
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
    largest, scale = _softmax(of_logits, TAPS)
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


@triton.jit(do_not_specialize=_SIZES)
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
    known = _known(within, DEPTH, CHANNELS)
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
            attended = (tl.exp(logit - largest) * scale)[:, None] * window
            filters = tap * heads * DEPTH + channel
            if MUL:
                attended *= tl.load(ghost_mul + filters, mask=known, other=0.0)[None, :]
            total += attended
            if ADD:
                total += tl.load(ghost_add + filters, mask=known, other=0.0)[None, :] * window
    pixel = (image * height + y) * width + x
    to = grad_value + (pixel * heads * DEPTH)[:, None] + channel[None, :]
    tl.store(to, total.to(grad_value.dtype.element_ty), mask=inside[:, None] & known[None, :])


@triton.jit(do_not_specialize=[*_SIZES, "rows", "parts"])
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
    known = _known(within, DEPTH, CHANNELS)
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
