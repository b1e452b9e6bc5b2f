"""What the user asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from elsa_core.param_groups import check_factors
from elsa_core.runtime.errors import UsageError

from .facts import Facts


@dataclass(frozen=True)
class Wish:
    """What the user asks for; None: the rules choose.

    ``starts``: whether the model starts from trained weights.
    """

    task: str
    model: str
    starts: bool = False
    epochs: int | None = None
    minutes: float | None = None
    batch: int | None = None
    workers: int | None = None
    layer_decay: float | None = None
    backbone_factor: float = 1.0


def check(facts: Facts, wish: Wish) -> None:
    """Raise UsageError for a wish that is not possible."""
    if wish.epochs is not None and wish.minutes is not None:
        raise UsageError("--epochs and --minutes exclude each other: give one of them")
    for name in ("epochs", "minutes", "batch"):
        value = getattr(wish, name)
        if value is not None and not (0 < value < math.inf):
            raise UsageError(f"--{name} must be above 0, got {value}")
    if wish.workers is not None and wish.workers < 0:
        raise UsageError(f"--workers must be 0 or more, got {wish.workers}")
    decay = 1.0 if wish.layer_decay is None else wish.layer_decay
    check_factors(decay, wish.backbone_factor, ("--layer-decay", "--backbone-factor"))
    if wish.batch is not None and wish.batch > facts.images:
        raise UsageError(
            f"--batch must be at most the {facts.images} training images, got {wish.batch}"
        )
