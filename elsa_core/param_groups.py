"""One rule for the learning rates and the weight decay of a backbone's parameters.

Layer-wise decay is that of BEiT (arXiv 2106.08254): with N blocks, numbered from 1 in the order in
which they compute, a parameter of layer i has the learning rate times
``layer_decay ** (N + 1 - i)``. Layer 0 is the patch embedding with position embedding and class
token; what reduces the map after a stage belongs to the stage's last block; output norms and all
parts of a model that are not the backbone are layer N + 1, at the full rate.
`StagedBackbone.get_layer_depth` numbers the layers, `StagedBackbone.no_weight_decay` names what is
not decayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .backbone import StagedBackbone
from .runtime.errors import UsageError
from .weights.recognise import WRAPPERS

NAMES = ("layer_decay", "backbone_lr_factor")
_FLAT = "_flat_param"  # of FSDP without use_orig_params


def lr_factors(
    model: nn.Module,
    layer_decay: float = 1.0,
    backbone_lr_factor: float = 1.0,
    names: Sequence[str] = NAMES,
) -> dict[nn.Parameter, float]:
    """Return the factor of the learning rate of each parameter of a model's backbones.

    Args:
        model: has one or more `StagedBackbone`, such as `ELSASwin` or `ELSAVolo`.
        layer_decay: factor from one layer to the one before, in (0, 1]; 1 switches it off.
        backbone_lr_factor: further factor of all parameters of the backbone, at least 0.
        names: of these two settings, for error messages.

    Raises:
        UsageError: a value is out of range, or the model has no backbone for one that is not 1.
    """
    check_factors(layer_decay, backbone_lr_factor, names)
    factors = {}
    for backbone in _backbones(model):
        for name, parameter in backbone.named_parameters():
            if not name.startswith(backbone.heads):
                depth, layers = backbone.get_layer_depth(WRAPPERS.sub(r"\1", name))
                factors[parameter] = backbone_lr_factor * layer_decay ** (layers - 1 - depth)
    if layer_decay == backbone_lr_factor == 1:
        return factors
    wanted = f"{names[0]} {layer_decay} and {names[1]} {backbone_lr_factor} need"
    if not factors:
        raise UsageError(f"{wanted} an ELSA backbone, the model has none")
    if any(name.endswith(_FLAT) for name, _ in model.named_parameters()):
        raise UsageError(f"{wanted} FSDP's use_orig_params, got flat parameters without names")
    return factors


def apply_rule(
    groups: Iterable[dict[str, Any]], model: nn.Module, lr: float, **settings: Any
) -> list[dict[str, Any]]:
    """Return an optimizer's groups by the rule of this module, one for each parameter.

    Frozen parameters are left out; one that several modules share is in the group of the first.

    Args:
        groups: with the key ``params`` and any others, such as ``lr`` and ``weight_decay``.
        model: whose parameters these are.
        lr: of groups without their own.
        settings: arguments of `lr_factors`.

    Raises:
        UsageError: as `lr_factors`.
    """
    factors = lr_factors(model, **settings)
    undecayed = {
        backbone.get_parameter(name)
        for backbone in _backbones(model)
        for name in backbone.no_weight_decay()
    }
    found: dict[nn.Parameter, dict[str, Any]] = {}
    for group in groups:
        for parameter in group["params"]:
            if parameter.requires_grad and parameter not in found:
                rate = group.get("lr", lr) * factors.get(parameter, 1.0)
                found[parameter] = {**group, "params": [parameter], "lr": rate}
                if parameter in undecayed:
                    found[parameter]["weight_decay"] = 0.0
    return list(found.values())


def describe(model: nn.Module, layer_decay: float, backbone_lr_factor: float) -> str:
    """Return one line for the log, "" for settings that change no learning rate."""
    if layer_decay == backbone_lr_factor == 1:
        return ""
    factors = lr_factors(model, layer_decay, backbone_lr_factor).values()
    return (
        f"{NAMES[0]} {layer_decay} and {NAMES[1]} {backbone_lr_factor} multiply the learning rates "
        f"of the backbone by {min(factors):.4g} (patch embedding) to {max(factors):.4g} (output)"
    )


def check_resumed(saved: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Raise UsageError unless the groups of a checkpoint's optimizer are those of an optimizer.

    Their sizes must be equal, and their learning rates in proportion to each other: optimizer and
    schedule would take the checkpoint's, and silently ignore what a config says now.
    """
    before, now = _proportions(saved), _proportions(groups)
    if before == now:
        return
    difference = f"{len(before)} parameter groups, the config {len(now)}"
    if len(before) == len(now):
        index = next(i for i, (old, new) in enumerate(zip(before, now, strict=True)) if old != new)
        (size, rate), (new_size, new_rate) = before[index], now[index]
        difference = (
            f"{size} tensors in parameter group {index} at {rate:.4g} times the highest rate, the "
            f"config {new_size} at {new_rate:.4g}"
        )
    raise UsageError(
        "a training resumes with the frozen parts and the proportions of the learning rates that "
        f"it began with: the checkpoint has {difference}"
    )


def _proportions(groups: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """The parameters of each group, and its learning rate, relative to the highest."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    highest = max(rates, default=0.0) or 1.0
    sizes = [len(group["params"]) for group in groups]
    return [(size, round(rate / highest, 9)) for size, rate in zip(sizes, rates, strict=True)]


def check_max_norm(name: str, value: Any) -> None:
    """Raise UsageError unless ``value`` can limit the norm of gradients."""
    _check(name, value, lambda x: x > 0, "above 0")


def check_factors(
    layer_decay: float, backbone_lr_factor: float, names: Sequence[str] = NAMES
) -> None:
    """Raise UsageError for a setting of `lr_factors` that is out of range."""
    _check(names[0], layer_decay, lambda x: 0 < x <= 1, "in (0, 1]")
    _check(names[1], backbone_lr_factor, lambda x: 0 <= x < math.inf, "of at least 0, and finite")


def _check(name: str, value: Any, good: Callable[[float], bool], rule: str) -> None:
    if not isinstance(value, (int, float)) or not good(value):
        raise UsageError(f"{name} must be a number {rule}, got {value!r}")


def _backbones(model: nn.Module) -> list[StagedBackbone]:
    return [module for module in model.modules() if isinstance(module, StagedBackbone)]
