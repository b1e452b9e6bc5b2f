"""The original's classifier written down a second time, from its description alone.

Plain PyTorch on the original's parameter names, with nothing of elsa_core. Where the original
refuses a size (odd maps; maps that windows do not divide), zeros are added as in its detectors.
"""

import torch
import torch.nn.functional as F


def original_logits(state, arch, image, always_shift=False):
    """[B, classes] of images [B, 3, H, W]; parameters with the names of an original checkpoint."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"].flatten(1), state.get(f"{name}.bias"))

    x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    x = norm(x.permute(0, 2, 3, 1), "patch_embed.norm")
    last = len(arch.depths) - 1
    for stage, depth in enumerate(arch.depths):
        for index in range(depth):
            name = f"layers.{stage}.blocks.{index}"
            y, attn = norm(x, f"{name}.norm1"), f"{name}.attn"
            if stage < last:
                x = x + _local(state, arch, arch.num_heads[stage], y, attn, linear)
            else:
                small = min(y.shape[1:3]) <= arch.window_size
                shift = arch.window_size // 2 if index % 2 and (always_shift or not small) else 0
                x = x + _windows(state, arch, shift, y, attn, linear)
            y = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
            x = x + linear(y, f"{name}.mlp.fc2")
        if stage < last:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            name = f"layers.{stage}.downsample"
            x = linear(norm(torch.cat(parts, -1), f"{name}.norm"), f"{name}.reduction")
    return linear(norm(x, "norm").mean((1, 2)), "head")


def _local(state, arch, heads, x, name, linear):
    """ELSA of a map [B, H, W, C], ghost filters added; lam 0 and gamma 1."""
    batch, height, width, channels = x.shape
    size = arch.kernel_size
    half = (linear(x, f"{name}.pre_proj").shape[-1] - channels) // 2
    query, key, value = linear(x, f"{name}.pre_proj").split([half, half, channels], -1)
    weight, bias = state[f"{name}.attn.0.weight"], state[f"{name}.attn.0.bias"]
    product, groups = (query * key).permute(0, 3, 1, 2), half // weight.shape[1]
    logits = F.conv2d(product, weight, bias, padding=size // 2, groups=groups)
    logits = linear(F.gelu(logits).permute(0, 2, 3, 1), f"{name}.attn.2")
    attention = logits.reshape(batch, height, width, heads, 1, size**2).softmax(-1)
    ghost = state[f"{name}.ghost_head"].reshape(heads, channels // heads, size**2)
    patches = F.unfold(value.permute(0, 3, 1, 2), size, padding=size // 2)
    patches = patches.reshape(batch, heads, channels // heads, size**2, height, width)
    x = ((attention + ghost) * patches.permute(0, 4, 5, 1, 2, 3)).sum(-1)
    return linear(x.reshape(batch, height, width, channels), f"{name}.post_proj")


def _windows(state, arch, shift, x, name, linear):
    """Window attention of a map [B, H, W, C], one window after the other."""
    size, heads = arch.window_size, arch.num_heads[-1]
    height, width, channels = x.shape[1:]
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size)).roll((-shift, -shift), (1, 2))
    row, column = torch.meshgrid(*(torch.arange(side) for side in x.shape[1:3]), indexing="ij")
    # Where the shift has joined the map's ends, in the last windows.
    ends = [side - shift for side in x.shape[1:3]]
    region = 2 * (row >= ends[0]) + (column >= ends[1]) if shift else torch.zeros_like(row)
    span = torch.arange(size).expand(size, size)
    rows, columns = span.T.flatten(), span.flatten()
    offsets = [axis[None, :] - axis[:, None] + size - 1 for axis in (rows, columns)]
    bias = state[f"{name}.rb"][:, offsets[0] * (2 * size - 1) + offsets[1]]
    out = torch.empty_like(x)
    for top in range(0, x.shape[1], size):
        for left in range(0, x.shape[2], size):
            window = (slice(None), slice(top, top + size), slice(left, left + size))
            part = x[window].flatten(1, 2)
            value, query, key = (
                t.reshape(*t.shape[:2], heads, -1).transpose(1, 2)
                for t in linear(part, f"{name}.pre_proj").chunk(3, -1)
            )
            scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + bias
            kind = region[window[1:]].flatten()
            scores = scores - 100.0 * (kind[:, None] != kind[None, :])
            part = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
            out[window] = part.unflatten(1, (size, size))
    out = out.roll((shift, shift), (1, 2))[:, :height, :width]
    return linear(out, f"{name}.post_proj")
