"""Says which part of a model cannot be exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from elsa_core.runtime.errors import UsageError


def check(what: str, got: Any, *allowed: Any) -> None:
    """Raises UsageError where a part of a model, a value or a class's bases, cannot be exported."""
    values = got if isinstance(got, tuple) and got and isinstance(got[0], type) else (got,)
    if any(value is good or value == good for value in values for good in allowed):
        return
    names = [getattr(value, "__name__", repr(value)) for value in (*allowed, values[0])]
    raise UsageError(
        f"the model cannot be exported: {what} must be {' or '.join(names[:-1])}, got {names[-1]}"
    )


# Layers with weights by name, how they must be set, and where classes of these names stand.
_LAYERS: dict[str, dict[str, Any]] = {
    "Conv2d": dict(stride=(1, 1), dilation=(1, 1), groups=1, padding_mode="zeros"),
    "ConvTranspose2d": dict(
        stride=(2, 2), padding=(0, 0), output_padding=(0, 0), dilation=(1, 1), groups=1
    ),
    "Linear": {},
    "GroupNorm": dict(eps=1e-5, num_groups=32),
    "BatchNorm2d": dict(eps=1e-5),
    "SyncBatchNorm": dict(eps=1e-5),
    "NaiveSyncBatchNorm": dict(eps=1e-5),
    "FrozenBatchNorm2d": dict(eps=1e-5),
    "_BatchNormXd": dict(eps=1e-5),  # what MMEngine makes of SyncBatchNorm
}
_PACKAGES = (
    "torch.nn.",
    "elsa_core.",
    "elsa_d2.",
    "detectron2.layers.",
    "mmcv.cnn.bricks.wrappers",
    "mmengine.model.utils",
)


def check_layers(part: str, module: nn.Module) -> None:
    """Raises UsageError where a layer with weights does not compute what that of `Detector` does.

    Args:
        part: name of ``module``.
    """
    for name, layer in module.named_modules():
        if not [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
            continue
        kind, what = type(layer), f"{part}.{name}".rstrip(".")
        if kind.__name__ not in _LAYERS or not kind.__module__.startswith(_PACKAGES):
            raise UsageError(
                f"the model cannot be exported: {what} must be a plain convolution, linear layer, "
                f"GroupNorm or BatchNorm, got {kind.__name__}"
            )
        for setting, value in _LAYERS[kind.__name__].items():
            check(f"{what}.{setting}", getattr(layer, setting), value)
        if isinstance(layer, nn.Conv2d):
            check(f"{what}.padding", layer.padding, tuple(side // 2 for side in layer.kernel_size))


def at_least(what: str, got: Any, least: int) -> None:
    """Raises UsageError for a number that is smaller, with which the frameworks mean "all"."""
    if got < least:
        raise UsageError(
            f"the model cannot be exported: {what} must be at least {least}, got {got}"
        )


def only(what: str, values: Sequence[Any]) -> Any:
    """The value that all levels or stages have; UsageError where they differ."""
    different = [value for value in values if value != values[0]]
    if different:
        raise UsageError(
            f"the model cannot be exported: {what} must be the same everywhere, got {values[0]} "
            f"and {different[0]}"
        )
    return values[0]


def stages(part: nn.Module) -> list[Any]:
    """The modules of a cascade's stages, or the module of the only one."""
    return list(part) if isinstance(part, nn.ModuleList) else [part]
