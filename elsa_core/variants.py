"""The ELSA-Swin variants as data (arXiv 2112.12786), and checks for custom ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from math import isfinite
from numbers import Integral, Real
from typing import Any


def _join(names: list[str]) -> str:
    return ", ".join(map(str, names))


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _positive_integers(name: str, values: Any) -> tuple[int, ...]:
    # Any sequence: a LazyConfig of Detectron2 has OmegaConf's.
    if (
        not isinstance(values, Sequence)
        or isinstance(values, (str, bytes))
        or not all(_is_integer(value) and value >= 1 for value in values)
    ):
        raise ValueError(
            f"{name} must be a list of integers of at least 1, one per stage, got {name}={values!r}"
        )
    return tuple(values)


@dataclass(frozen=True)
class Arch:
    """Architecture of an ELSA-Swin.

    Stage i has ``embed_dim * 2**i`` channels, ``depths[i]`` blocks and ``num_heads[i]`` heads.
    The last stage uses (shifted-)window attention, all stages before it use ELSA.

    ``group_width``: channels per group of the convolution that makes ELSA's logits.
    ``kernel_size``: side of ELSA's neighbourhood, odd.
    ``lam``, ``gamma``: exponent of the multiplicative and factor of the additive ghost filters;
    0 leaves that part and its parameters out. ``lam`` is a whole number, because the filters
    take both signs and a fractional power of a negative number does not exist.
    ``window_size``: side of the last stage's windows.

    Raises ValueError if values contradict each other or these rules.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    group_width: int
    kernel_size: int = 7
    lam: float = 0
    gamma: float = 1
    window_size: int = 7

    def __post_init__(self) -> None:
        for name in ("depths", "num_heads"):
            object.__setattr__(self, name, _positive_integers(name, getattr(self, name)))
        for name in ("embed_dim", "group_width", "kernel_size", "window_size"):
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {name}={value!r}")
        for name in ("lam", "gamma"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {name}={value!r}")
        if self.embed_dim < 3:
            raise ValueError(f"embed_dim must be at least 3, got embed_dim={self.embed_dim}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got kernel_size={self.kernel_size}")
        if self.lam < 0 or self.lam != int(self.lam):
            raise ValueError(f"lam must be a whole number of at least 0, got lam={self.lam}")
        if len(self.depths) < 2:
            raise ValueError(
                "depths must name at least 2 stages, ELSA stages and a last one with window "
                f"attention, got depths={self.depths}"
            )
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                "depths and num_heads must have one entry per stage, "
                f"got depths={self.depths} and num_heads={self.num_heads}"
            )
        for stage, (dim, heads) in enumerate(zip(self.num_features, self.num_heads, strict=True)):
            if dim % heads:
                raise ValueError(
                    "the channels of a stage, embed_dim * 2**stage, must be divisible by its "
                    f"num_heads, got {dim} channels and {heads} heads in stage {stage}"
                )

    @property
    def num_features(self) -> list[int]:
        """Channels of each stage."""
        return [self.embed_dim * 2**stage for stage in range(len(self.depths))]

    @classmethod
    def from_spec(cls, spec: str | Mapping[str, Any] | Arch) -> Arch:
        """Return an `Arch` from a variant's name or a mapping with this class's field names."""
        if isinstance(spec, Arch):
            return spec
        if isinstance(spec, str):
            if spec not in VARIANTS:
                raise ValueError(f"arch must be one of {', '.join(VARIANTS)}, got arch={spec!r}")
            return VARIANTS[spec]
        if not isinstance(spec, Mapping):
            raise ValueError(f"arch must be a variant's name or a dict, got arch={spec!r}")
        known = [field.name for field in fields(cls)]
        required = [field.name for field in fields(cls) if field.default is MISSING]
        if missing := [name for name in required if name not in spec]:
            raise ValueError(f"a dict arch needs {', '.join(required)}, missing {_join(missing)}")
        if unknown := [name for name in spec if name not in known]:
            raise ValueError(f"a dict arch knows {', '.join(known)}, got {_join(unknown)}")
        return cls(**{name: spec[name] for name in spec})


VARIANTS: dict[str, Arch] = {
    "tiny": Arch(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), group_width=4),
    "small": Arch(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), group_width=8),
    "base": Arch(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), group_width=8),
}
