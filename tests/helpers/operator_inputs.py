"""What the operator's tests give to it, on every device."""

import torch

SHORT_AXES = [(4, 5, 1), (1, 5, 1), (4, 1, 5), (4, 1, 1), (1, 1, 5), (1, 1, 1)]
"""Batch, height and width, of length 1 where strides mean nothing."""
GHOSTS = {"none": (), "add": ("add",), "mul": ("mul",), "both": ("add", "mul")}


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


def with_odd_strides(tensor):
    """The same numbers in the same memory, with arbitrary strides where an axis has length 1."""
    sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
    odd = [stride if size != 1 else 1_000_003 + size for size, stride in sizes_and_strides]
    return tensor.as_strided(tensor.shape, odd)
