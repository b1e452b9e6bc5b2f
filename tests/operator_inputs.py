"""What the operator's tests give to it, on every device."""

import torch

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
