"""Runs one image through Detectron2 and OpenMMLab with the same weights and compares all stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elsa_core.runtime.errors import UsageError
from elsa_core.weights.convert import MODELS, Conversion, convert
from elsa_core.weights.files import read_source
from elsa_core.weights.names import UPERNET
from elsa_core.weights.source import DETECTRON2, Source
from elsa_core.weights.volo import Volo
from elsa_tools.inspect.attention import to_input

from .compare import Differences, Outcome, compare
from .configs import check_heads
from .image import read_image


def verify(
    conversion: Conversion, destination: str, image: str | None = None, configs: Sequence[str] = ()
) -> Differences:
    """The largest differences between both frameworks, one with SRC's tensors, one with DST's.

    DST is read back from its file; each model must take its tensors without a missing or an unknown
    one.

    Args:
        image: a file; None: a drawn image of 640x480 pixels.
        configs: .yaml for Detectron2, .py for OpenMMLab, taken as they are; for a framework without
            one, ours of the same method with the sizes that the tensors have.

    Raises:
        UsageError: an image or config that cannot be used, or a checkpoint that does not match one.
    """
    yaml = _only(configs, ".yaml", ".yml")
    python = _only(configs, ".py")
    if unknown := [name for name in configs if name not in (yaml, python)]:
        raise UsageError(f"--config must end in .yaml or .py, got {unknown[0]}")
    picture = read_image(image)
    source, copy = conversion.source, read_source(destination)
    if source.kind not in MODELS or conversion.to == "backbone":
        return _verify_backbone(conversion, destination, picture)
    from . import d2, mm

    # SRC runs in its own framework, DST in the other one.
    first, second = (source, copy) if source.family == DETECTRON2 else (copy, source)
    openmmlab = "mmseg" if source.kind == UPERNET else "mmdet"
    return compare(
        d2.run(conversion, _tensors(first, "detectron2", conversion), picture, yaml),
        mm.run(conversion, _tensors(second, openmmlab, conversion), picture, python),
    )


def _only(configs: Sequence[str], *suffixes: str) -> str | None:
    found = [name for name in configs if name.endswith(suffixes)]
    if len(found) > 1:
        raise UsageError(f"--config must name one {suffixes[0]} file, got {' and '.join(found)}")
    return found[0] if found else None


def _tensors(source: Source, to: str, conversion: Conversion) -> dict[str, Tensor]:
    """The tensors under the names of ``to``, converted only if they have others."""
    if (source.family == DETECTRON2) != (to == "detectron2"):
        return convert(source, to, anchor_sizes=conversion.anchor_sizes).tensors
    if to == "detectron2":
        return dict(source.tensors.values())
    return {name: tensor for name, (_, tensor) in source.tensors.items()}


def _verify_backbone(conversion: Conversion, destination: str, image: Tensor) -> Differences:
    import elsa_d2
    import elsa_mm

    wanted = convert(conversion.source, "backbone").tensors
    got = convert(read_source(destination), "backbone").tensors
    if wanted.keys() != got.keys():
        raise UsageError(f"{destination} has other tensors than its source")
    backbone = conversion.source.backbone
    options: dict[str, Any] = {"arch": backbone}
    if isinstance(backbone, Volo):
        check_heads(backbone)
        options = backbone.options
    name = "ELSAVolo" if isinstance(backbone, Volo) else "ELSASwin"
    pixels = to_input(image.flip(2).numpy())
    outcomes = []
    for package, tensors in ((elsa_d2, got), (elsa_mm, wanted)):
        torch.manual_seed(0)  # of what the tensors lack
        model = getattr(package, name)(**options).eval()
        model.load_state_dict(tensors, strict=False)
        with torch.no_grad():
            maps = model(pixels)
        maps = maps.values() if isinstance(maps, dict) else maps
        outcomes.append(Outcome({f"res{i + 2}": value[0] for i, value in enumerate(maps)}))
    return compare(*outcomes)
