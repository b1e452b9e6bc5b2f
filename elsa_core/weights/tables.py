"""Tables of tensor shapes, what fills them, and ELSA's layer, which both families have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from elsa_core.layers import query_channels
from elsa_core.runtime.errors import UsageError
from elsa_core.variants import Arch, VoloArch

Shapes = dict[str, tuple[int, ...]]
OPTIONAL_LEAF = "num_batches_tracked"


@dataclass
class ShapeTable:
    shapes: Shapes = field(default_factory=dict)

    def layer(self, name: str, *shape: int, bias: bool = True) -> None:
        self.shapes[f"{name}.weight"] = shape
        if bias:
            self.shapes[f"{name}.bias"] = (shape[0],)

    def block(self, name: str, *shape: int, norm: str) -> None:
        """Add a ConvModule. Its convolution has a bias if no norm follows."""
        self.layer(f"{name}.conv", *shape, bias=not norm)
        if norm:
            self.layer(f"{name}.{norm}", shape[0])
        if norm == "bn":
            self.statistics(f"{name}.bn", shape[0])

    def statistics(self, name: str, channels: int) -> None:
        """Add the buffers of a batch norm."""
        for statistic in ("running_mean", "running_var"):
            self.shapes[f"{name}.{statistic}"] = (channels,)
        self.shapes[f"{name}.{OPTIONAL_LEAF}"] = ()

    def mlp(self, name: str, dim: int, ratio: int) -> None:
        self.layer(f"{name}.fc1", ratio * dim, dim)
        self.layer(f"{name}.fc2", dim, ratio * dim)

    def elsa(
        self, name: str, arch: Arch | VoloArch, dim: int, heads: int, bias: bool = True
    ) -> None:
        """Add ELSA's layer; ``bias``: of ``pre_proj``."""
        dim_qk = query_channels(dim, arch.group_width)
        area = arch.kernel_size**2
        filters = (1, dim, arch.kernel_size, arch.kernel_size)
        if arch.lam or arch.gamma:
            both = arch.lam and arch.gamma
            self.shapes[f"{name}.ghost_head"] = (2, *filters) if both else filters
        self.layer(f"{name}.pre_proj", 2 * dim_qk + dim, dim, 1, 1, bias=bias)
        self.layer(f"{name}.attn.0", dim_qk, arch.group_width, arch.kernel_size, arch.kernel_size)
        self.layer(f"{name}.attn.2", area * heads, dim_qk, 1, 1)
        self.layer(f"{name}.post_proj", dim, dim)


def shape_of(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> list[int]:
    """Return a tensor's shape. Raise UsageError if it is missing, empty, or of other dimensions."""
    if name not in tensors:
        raise UsageError(f"the tensor {name} is missing")
    shape = list(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise UsageError(
            f"{name} must have {dimensions} dimensions, none of size 0, got the shape {shape}"
        )
    return shape


def count_indices(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Count the indices that follow ``prefix``."""
    found = {key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)}
    return len({index for index in found if index.isdigit()})


def read_elsa(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Return the settings of the layer ``name`` as an architecture has them.

    A single set of ghost filters is taken as additive. Their exponent and factor are not in the
    tensors: they are taken as 1, as in all published models.
    """
    _, group_width, kernel_size, _ = shape_of(tensors, f"{name}.attn.0.weight", 4)
    ghost = tensors.get(f"{name}.ghost_head")
    both = ghost is not None and ghost.dim() == 5
    return {
        "group_width": group_width,
        "kernel_size": kernel_size,
        "lam": 1 if both else 0,
        "gamma": 0 if ghost is None else 1,
    }


def read_heads(tensors: Mapping[str, Tensor], name: str, kernel_size: int) -> int:
    return shape_of(tensors, f"{name}.attn.2.weight", 4)[0] // kernel_size**2
