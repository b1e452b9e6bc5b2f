"""Architectures of both families, as users name them on command lines, and their backbones."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from elsa_core import VARIANTS, VOLO_VARIANTS, ELSASwin, ELSAVolo
from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.variants import Arch, VoloArch
from elsa_core.weights.shapes import arch_name

Backbone = ELSASwin | ELSAVolo
NAMES = [*VARIANTS, *VOLO_VARIANTS]


def read_arch(text: str) -> Arch | VoloArch:
    """Parse the name of a variant, or a dict in Python's or JSON's notation.

    A dict with ``embed_dims``, which ELSA-Swin does not have, describes an ELSA-VOLO.

    Raises UsageError for anything else, and for a dict that describes neither.
    """
    spec: Any = text
    if text not in NAMES:
        try:
            spec = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            spec = None
        if not isinstance(spec, Mapping):
            raise UsageError(
                f"--arch must be one of {', '.join(NAMES)} or a dict such as "
                f"'{{\"embed_dim\": 32, ...}}', got {text}"
            )
    volo = text in VOLO_VARIANTS or "embed_dims" in spec
    try:
        return VoloArch.from_spec(spec) if volo else Arch.from_spec(spec)
    except ValueError as error:
        raise UsageError(f"--arch: {one_line(error)}") from error


def describe_arch(arch: Arch | VoloArch) -> str:
    """Return "ELSA-Swin tiny", "ELSA-VOLO D1" or "ELSA-Swin 32 channels, blocks 1-1-2-1"."""
    if isinstance(arch, VoloArch):
        family, channels = "ELSA-VOLO", "-".join(map(str, arch.embed_dims))
    else:
        family, channels = "ELSA-Swin", str(arch.embed_dim)
    if (name := arch_name(arch)) != "custom":
        return f"{family} {name.replace('volo_d', 'D')}"
    return f"{family} {channels} channels, blocks {'-'.join(map(str, arch.depths))}"


def build_backbone(arch: Arch | VoloArch, **options: Any) -> Backbone:
    """Build a backbone with all outputs and their norms, as detectors and segmentors use it.

    Args:
        options: further arguments of `ELSAVolo`; of an ELSA-Swin they are left out.
    """
    if isinstance(arch, VoloArch):
        return ELSAVolo(arch, **options)
    return ELSASwin(arch, out_indices=range(len(arch.depths)))
