"""The ELSA-Swin and ELSA-VOLO variants as data (arXiv 2112.12786), and checks for custom ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from math import isfinite
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

_Self = TypeVar("_Self", bound="_Spec")


def _join(names: list[str]) -> str:
    return ", ".join(map(str, names))


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _positive_integers(name: str, values: Any, length: int | None = None) -> tuple[int, ...]:
    # Any sequence: a LazyConfig of Detectron2 has OmegaConf's.
    if (
        not isinstance(values, Sequence)
        or isinstance(values, (str, bytes))
        or not all(_is_integer(value) and value >= 1 for value in values)
        or length not in (None, len(values))
    ):
        items, per_stage = (
            ("integers", ", one per stage") if length is None else (f"{length} integers", "")
        )
        raise ValueError(
            f"{name} must be a list of {items} of at least 1{per_stage}, got {name}={values!r}"
        )
    return tuple(values)


class _Spec:
    """What the architectures of both families share: checks, and variants by name."""

    variants: ClassVar[dict[str, Any]]

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_integers(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {name}={value!r}")

    def _check_numbers(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, Real) or not isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {name}={value!r}")

    def _check_elsa(self, kernel_size: int, lam: float) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got kernel_size={kernel_size}")
        if lam < 0 or lam != int(lam):
            raise ValueError(f"lam must be a whole number of at least 0, got lam={lam}")

    @classmethod
    def from_spec(cls: type[_Self], spec: str | Mapping[str, Any] | _Self) -> _Self:
        """Return an architecture from a variant's name or a mapping with this class's field names.

        Raises:
            ValueError: neither, an unknown variant, or missing, unknown or contradictory fields.
        """
        if isinstance(spec, cls):
            return spec
        if isinstance(spec, str):
            if spec not in cls.variants:
                known = ", ".join(cls.variants)
                raise ValueError(f"arch must be one of {known}, got arch={spec!r}")
            variant: _Self = cls.variants[spec]
            return variant
        if not isinstance(spec, Mapping):
            raise ValueError(f"arch must be a variant's name or a dict, got arch={spec!r}")
        described: tuple[Any, ...] = fields(cls)  # type: ignore[arg-type]
        names = [field.name for field in described]
        required = [field.name for field in described if field.default is MISSING]
        if missing := [name for name in required if name not in spec]:
            raise ValueError(f"a dict arch needs {', '.join(required)}, missing {_join(missing)}")
        if unknown := [name for name in spec if name not in names]:
            raise ValueError(f"a dict arch knows {', '.join(names)}, got {_join(unknown)}")
        return cls(**{name: spec[name] for name in spec})


@dataclass(frozen=True)
class Arch(_Spec):
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
            self._set(**{name: _positive_integers(name, getattr(self, name))})
        self._check_integers("embed_dim", "group_width", "kernel_size", "window_size")
        self._check_numbers("lam", "gamma")
        if self.embed_dim < 3:
            raise ValueError(f"embed_dim must be at least 3, got embed_dim={self.embed_dim}")
        self._check_elsa(self.kernel_size, self.lam)
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


VARIANTS: dict[str, Arch] = {
    "tiny": Arch(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), group_width=4),
    "small": Arch(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), group_width=8),
    "base": Arch(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), group_width=8),
}
Arch.variants = VARIANTS


@dataclass(frozen=True)
class VoloArch(_Spec):
    """Architecture of an ELSA-VOLO.

    The four stages are VOLO's ``network.0``, ``.2``, ``.3`` and ``.4`` (arXiv 2106.13112):
    ``depths`` are their blocks. The first attends with ELSA at stride 8, the others with global
    attention at stride 16; ``embed_dims`` and ``num_heads`` are the channels and heads of the first
    stage and of the others.

    ``mlp_ratio``: hidden channels of the MLPs per channel. ``stem_dim``: channels of the stem's
    convolutions. ``kernel_size``, ``group_width``, ``lam``, ``gamma``: as in `Arch`.
    ``qkv_bias``: biases of the projections to query, key and value. ``qk_scale``: factor of ELSA's
    product of query and key.

    Nothing was published of the paper's ELSA-VOLO but its accuracy and FLOPs: the ELSA settings are
    reconstructed (docs/elsa_volo.md), and no official checkpoint exists to compare with.

    Raises ValueError if values contradict each other or these rules.
    """

    depths: tuple[int, ...]
    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: int = 3
    stem_dim: int = 64
    kernel_size: int = 5
    group_width: int = 8
    lam: float = 1
    gamma: float = 1
    qkv_bias: bool = False
    qk_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, length in (("depths", 4), ("embed_dims", 2), ("num_heads", 2)):
            self._set(**{name: _positive_integers(name, getattr(self, name), length)})
        self._check_integers("mlp_ratio", "stem_dim", "kernel_size", "group_width")
        self._check_numbers("lam", "gamma", "qk_scale")
        if not isinstance(self.qkv_bias, bool):
            raise ValueError(f"qkv_bias must be True or False, got qkv_bias={self.qkv_bias!r}")
        if self.embed_dims[0] < 3:
            raise ValueError(f"embed_dims must be at least 3, got embed_dims={self.embed_dims}")
        self._check_elsa(self.kernel_size, self.lam)
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(
                    "embed_dims must be divisible by num_heads, got "
                    f"embed_dims={self.embed_dims} and num_heads={self.num_heads}"
                )

    @property
    def num_features(self) -> list[int]:
        """Channels of each stage."""
        return [self.embed_dims[0], *[self.embed_dims[1]] * 3]


VOLO_VARIANTS: dict[str, VoloArch] = {
    "volo_d1": VoloArch((4, 4, 8, 2), (192, 384), (6, 12)),
    "volo_d2": VoloArch((6, 4, 10, 4), (256, 512), (8, 16)),
    "volo_d3": VoloArch((8, 8, 16, 4), (256, 512), (8, 16)),
    "volo_d4": VoloArch((8, 8, 16, 4), (384, 768), (12, 16)),
    "volo_d5": VoloArch((12, 12, 20, 4), (384, 768), (12, 16), mlp_ratio=4, stem_dim=128),
}
VoloArch.variants = VOLO_VARIANTS
