"""Supported versions of Python and PyTorch. setup.py reads this file, so it imports nothing."""

from __future__ import annotations

PYTHON = (3, 10), (3, 14)
"""The oldest and the newest Python."""
TORCH = 2, 6
"""The oldest PyTorch: below it, ``torch.load(weights_only=True)`` is not safe."""
TORCH_WITH_EXTENSION = 2, 10
"""The oldest PyTorch whose stable ABI has all that the compiled operator uses."""


def dotted(version: tuple[int, ...]) -> str:
    """Return a version as text, such as 3.10."""
    return ".".join(map(str, version))


def numbers(version: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as 2.11.0+cu130."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def python_obstacle(version: tuple[int, ...]) -> str | None:
    """Return a sentence if this version of Python is not supported, else None."""
    if PYTHON[0] <= version[:2] <= PYTHON[1]:
        return None
    least, most = map(dotted, PYTHON)
    return f"elsa-swin needs Python {least} to {most}, and this is Python {dotted(version[:2])}"


def torch_obstacle(version: str) -> str | None:
    """Return a sentence if this version of PyTorch is not supported, else None."""
    if numbers(version) >= TORCH:
        return None
    return f"elsa-swin needs PyTorch {dotted(TORCH)} or later, and this is PyTorch {version}"
