"""Small ELSA-VOLO models, and timm's VOLO of the same architecture as their judge."""

import torch

from elsa_core.variants import VoloArch

ARCH = {
    "depths": (2, 1, 2, 1),
    "embed_dims": (16, 24),
    "num_heads": (2, 3),
    "stem_dim": 8,
    "group_width": 4,
}


def build(kind, seed=0, **options):
    """A model of a class of ELSA-VOLO, small unless told."""
    torch.manual_seed(seed)
    return kind(**{"arch": ARCH, "img_size": 64, **options})


def randomise(model):
    """Give every parameter and statistic a value of its own, so that none can be mistaken."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.add_(noise, alpha=0.1).abs_() if (tensor == 1).all() else tensor.add_(noise / 8)
    return model


def with_outlook_attention(model):
    """Put timm's outlook attention where ELSA is: the model is VOLO then."""
    from timm.models.volo import OutlookAttention

    for block in model.network[0]:
        dim, heads = model.arch.embed_dims[0], model.arch.num_heads[0]
        block.attn = OutlookAttention(dim, heads, stride=2, qkv_bias=model.arch.qkv_bias)
    return model


def timm_volo(arch, size, **options):
    """timm's VOLO for images of ``size`` (rows, columns), without ELSA's settings."""
    from timm.models.volo import VOLO

    arch = VoloArch.from_spec(arch)
    return VOLO(
        list(arch.depths),
        img_size=size,
        stem_hidden_dim=arch.stem_dim,
        embed_dims=arch.num_features,
        num_heads=[arch.num_heads[0], *[arch.num_heads[1]] * 3],
        mlp_ratio=arch.mlp_ratio,
        qkv_bias=arch.qkv_bias,
        **options,
    )


def cubic_matrix(length, size):
    """Cubic convolution (Keys 1981, a = -0.75) from ``length`` samples to ``size``, as a matrix."""
    a = -0.75
    places = (torch.arange(size, dtype=torch.float64) + 0.5) * length / size - 0.5
    first = places.floor().long() - 1
    matrix = torch.zeros(size, length, dtype=torch.float64)
    for tap in range(4):
        d = (places - (first + tap)).abs()
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        columns = (first + tap).clamp(0, length - 1)
        matrix[torch.arange(size), columns] += torch.where(d <= 1, near, far)
    return matrix


def resized(position, size):
    """A position embedding [1, h, w, D] at another size, by the definition."""
    rows, columns = (cubic_matrix(n, s) for n, s in zip(position.shape[1:3], size, strict=True))
    return torch.einsum("ih,jw,bhwd->bijd", rows, columns, position.double()).to(position.dtype)
