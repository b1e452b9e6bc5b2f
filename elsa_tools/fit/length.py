"""How long ``elsa fit`` trains: from the number of images, or what fits into a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from elsa_core.runtime.errors import UsageError
from elsa_tools.results.run import Rule

from .facts import Facts
from .wish import Wish

# Passes over the data set from random weights and from trained ones, and the least iterations.
EPOCHS = {False: (36, 600), True: (12, 300)}
PROBE_ITERATIONS = 30
# Seconds kept for the report, and the part of the remaining time that is planned.
REPORT_SECONDS, PLANNED = 10, 0.94
# Time of an evaluation by that of its images: the scores are computed, too.
SCORING = 1.2
# Part of the time that evaluations during the training may take.
EVALUATING = 0.15


@dataclass(frozen=True)
class Timing:
    """What a probe measured, in seconds.

    Args:
        startup: from the start of the trainer's process to its first iteration.
        iteration: of one iteration.
        image: of the evaluation of one image.
        spent: since the command began.
    """

    startup: float
    iteration: float
    image: float
    spent: float = 0


@dataclass(frozen=True)
class Length:
    """Iterations in all and between two evaluations; whether averaged weights are evaluated."""

    iterations: int
    evaluate: int
    averaged: bool
    rules: tuple[Rule, ...]


def length(facts: Facts, wish: Wish, batch: int, timing: Timing | None) -> Length:
    """Return the length of a training; without a timing, for ``minutes``, that of a probe."""
    epoch = math.ceil(facts.images / batch)
    if wish.minutes is not None and timing is None:
        return Length(PROBE_ITERATIONS, PROBE_ITERATIONS, False, (_averaging(True),))
    if wish.minutes is not None and timing is not None:
        return _fit_time(facts, wish.minutes, epoch, timing)
    epochs, least = EPOCHS[wish.starts]
    iterations = max(epochs * epoch, least) if wish.epochs is None else wish.epochs * epoch
    count = min(10, max(1, iterations // 50))
    start = "trained" if wish.starts else "random"
    why = f"{epochs} epochs, as the weights are {start}; at least {least} iterations"
    length = f"{iterations} iterations, {round(iterations / epoch, 1):g} epochs"
    return Length(
        iterations,
        math.ceil(iterations / count),
        True,
        (
            Rule("length", length, why if wish.epochs is None else "as asked for"),
            Rule("evaluations", str(count), "one in 50 iterations, at most 10"),
            _averaging(True),
        ),
    )


def _averaging(on: bool) -> Rule:
    why = (
        "evaluated beside the others, and the best checkpoint is theirs; with --minutes, unless "
        f"one evaluation of both takes more than {EVALUATING:.0%} of the time"
    )
    return Rule("averaged weights", "on" if on else "off", why)


def _fit_time(facts: Facts, minutes: float, epoch: int, timing: Timing) -> Length:
    single = SCORING * facts.val_images * timing.image
    # The trainer starts twice: to train, and to evaluate the best checkpoint.
    fixed = timing.spent + 2 * timing.startup + single + REPORT_SECONDS
    left = PLANNED * (60 * minutes - fixed)
    averaged = 2 * single <= left * EVALUATING
    evaluation = (1 + averaged) * single
    count = max(1, min(5, int(left * EVALUATING / evaluation)))
    iterations = int((left - count * evaluation) / timing.iteration)
    if iterations < 10:
        needed = (fixed + (evaluation + 10 * timing.iteration) / PLANNED) / 60
        raise UsageError(
            f"--minutes {minutes:g} is too short: here the training starts in "
            f"{timing.startup:.0f} s, an iteration takes {timing.iteration:.2g} s and an "
            f"evaluation {evaluation:.0f} s, which needs at least "
            f"{math.ceil(10 * needed) / 10:g} minutes"
        )
    count = max(1, min(count, iterations // 50))
    return Length(
        iterations,
        math.ceil(iterations / count),
        averaged,
        (
            Rule(
                "length",
                f"{iterations} iterations, {round(iterations / epoch, 1):g} epochs",
                f"what fits into {minutes:g} minutes: an iteration takes {timing.iteration:.2g} s, "
                f"an evaluation {evaluation:.0f} s, a start {timing.startup:.0f} s",
            ),
            Rule(
                "evaluations",
                str(count),
                f"at most {EVALUATING:.0%} of the time, one in 50 iterations, at most 5",
            ),
            _averaging(averaged),
        ),
    )


def patience_of(wish: Wish, evaluations: int) -> tuple[int, Rule]:
    """Return a number of evaluations."""
    if wish.minutes is not None or wish.epochs is not None:
        return 0, Rule("early stop", "none", "the length is as asked for")
    patience = max(3, evaluations // 2)
    value = f"after {patience} evaluations without a better score"
    return patience, Rule("early stop", value, "half of the evaluations, at least 3")
