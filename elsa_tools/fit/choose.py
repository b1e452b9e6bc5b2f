"""The rules by which ``elsa fit`` chooses: functions of measured facts, without side effects.

docs/fit.md has the same rules as a table.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from elsa_tools.results.run import Rule

from .dataset import SEMANTIC
from .facts import Facts, Machine
from .length import Timing, length, patience_of
from .wish import Wish, check

SMALL = "small"
MODELS = {"t": "tiny", "s": "small", "b": "base", SMALL: "custom", "volo_d1": "volo_d1"}
# Short side of images by device: what larger images are resized to, and what images with small
# objects are enlarged to at most.
USUAL_SIDE, LARGEST_SIDE = {"cpu": 320, "cuda": 800}, {"cpu": 640, "cuda": 1024}
# Pixels that nine of ten objects shall have after the resize.
OBJECT_PIXELS = 24
STRIDES = (4, 8, 16, 32, 64)
# Octaves between the smallest and the largest objects from which one size of anchors a level is
# enough.
WIDE = 2
RATIOS = (0.2, 1 / 3, 0.5, 1.0, 2.0, 3.0, 5.0)
# Learning rate of AdamW and its batch size, by model and whether it starts from weights.
RATES = {
    (True, False): (1.5e-3, 4),
    (True, True): (5e-4, 4),
    (False, False): (2e-4, 16),
    (False, True): (1e-4, 16),
}
# Bytes of memory that training takes for each pixel of a batch, by model, measured (docs/fit.md).
PIXEL_BYTES = {SMALL: 1_500, "t": 4_000, "s": 5_500, "b": 7_000, "volo_d1": 4_500}
MOST_IMAGES = {"cpu": 4, "cuda": 16}
# Factor of the learning rate from one layer to the one before, of trained backbones.
LAYER_DECAY = 0.9
# Limit of the norm of all gradients.
CLIP = 10.0
MIRRORED = re.compile(
    r"left|right|text|letters?|digits?|char(acter)?s?|numbers?|numerals?|words?|arrows?|signs?|"
    r"plates?|logos?|clocks?|east|west",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Choice:
    """The settings of a training.

    Args:
        short, long: limits of the sides of test images, in pixels.
        shorts: short sides of training images.
        scale: smallest anchor by stride; ``octave``: anchor sizes a level.
        ratios: heights of anchors by their widths.
        weights: of the classes in the loss; empty: equal.
        evaluate, save: iterations between two evaluations, and two checkpoints.
        averaged: whether averaged weights are evaluated beside the others.
        patience: evaluations without a better score after which the training ends; 0: none end it.
        layer_decay: factor of the learning rate from one layer of the backbone to the one before.
        backbone_factor: of the learning rate of all of the backbone.
        clip: limit of the norm of all gradients.
        rules: one of each choice.
    """

    short: int
    long: int
    shorts: tuple[int, ...]
    scale: int
    octave: int
    ratios: tuple[float, ...]
    flip: bool
    batch: int
    workers: int
    rate: float
    iterations: int
    warmup: int
    evaluate: int
    save: int
    patience: int
    averaged: bool
    amp: bool
    layer_decay: float
    backbone_factor: float
    clip: float
    weights: tuple[float, ...]
    rules: tuple[Rule, ...]

    @property
    def sizes(self) -> list[list[float]]:
        """Sides of the anchors of each level, in pixels."""
        steps = [2 ** (step / self.octave) for step in range(self.octave)]
        return [[round(self.scale * stride * step, 1) for step in steps] for stride in STRIDES]


def choose(facts: Facts, machine: Machine, wish: Wish, timing: Timing | None = None) -> Choice:
    """Return the settings of a training.

    Args:
        timing: of a probe, for ``wish.minutes``; None: the settings of the probe itself.

    Raises:
        UsageError: a wish is not possible.
    """
    check(facts, wish)
    short, long, sized = _size(facts, machine)
    shorts = tuple(_multiple(short * factor, 8) for factor in (7 / 8, 1, 9 / 8))
    batch, batched = _batch(facts, machine, wish, long * short)
    chosen = length(facts, wish, batch, timing)
    iterations, evaluate = chosen.iterations, chosen.evaluate
    rate, rated = _rate(wish, batch)
    flip, flipped = _flip(facts)
    rules = [sized]
    scale, octave = 4, 1
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    if wish.task != SEMANTIC:
        (scale, octave, ratios), anchored = _anchors(facts, short)
        rules += anchored
    weights, weighted = _class_weights(facts)
    workers, working = _workers(machine, wish, short * long)
    warmup = max(1, min(500, round(iterations / 12)))
    patience, patient = patience_of(wish, math.ceil(iterations / evaluate))
    amp = machine.device == "cuda"
    layer_decay, decayed = _layer_decay(wish)
    rules += [
        flipped,
        *weighted,
        batched,
        *chosen.rules,
        patient,
        rated,
        Rule(
            "warm-up",
            f"{warmup} iteration{'s' * (warmup > 1)}",
            "a twelfth of the iterations, at most 500; then the rate falls to 0 on a cosine",
        ),
        decayed,
        Rule(
            "backbone's rate",
            f"times {wish.backbone_factor:g}",
            "--backbone-factor, 1 without it",
        ),
        Rule(
            "clipping",
            f"{CLIP:g}",
            "limit of the norm of all gradients, which a usual batch does not reach",
        ),
        Rule(
            "precision",
            "mixed" if amp else "float32",
            "mixed precision on GPUs; CPUs are faster in float32",
        ),
        working,
    ]
    return Choice(
        short,
        long,
        shorts,
        scale,
        octave,
        ratios,
        flip,
        batch,
        workers,
        rate,
        iterations,
        warmup,
        evaluate,
        max(1, min(evaluate, 200)),
        patience,
        chosen.averaged,
        amp,
        layer_decay,
        wish.backbone_factor,
        CLIP,
        weights,
        tuple(rules),
    )


def _multiple(pixels: float, of: int = 32) -> int:
    return max(2 * of, of * round(pixels / of))


def _size(facts: Facts, machine: Machine) -> tuple[int, int, Rule]:
    usual, largest = USUAL_SIDE[machine.device], LARGEST_SIDE[machine.device]
    side: float = min(facts.short, usual)
    why = f"the images' own, at most {usual} on this device"
    if facts.small and facts.small * side < OBJECT_PIXELS:
        side = max(side, min(OBJECT_PIXELS / facts.small, 2 * facts.short, largest))
        why = (
            f"so that nine of ten objects have {OBJECT_PIXELS} pixels, at most twice the images' "
            f"own and {largest} on this device"
        )
    short = _multiple(side)
    long = 32 * math.ceil(round(short * min(facts.aspect, 2.5) / 32, 6))
    value = f"short side {short}, long side at most {long} pixels; in training times 7/8 to 9/8"
    return short, long, Rule("image size", value, f"{why}; median short side: {facts.short}")


def _anchors(facts: Facts, short: int) -> tuple[tuple[int, int, tuple[float, ...]], list[Rule]]:
    small, large = facts.small * short, facts.large * short
    scale = min((2, 3, 4, 6, 8), key=lambda one: abs(math.log2(one * STRIDES[0] / small)))
    octave = 2 if math.log2(large / small) < WIDE else 1
    low, high = facts.narrow / math.sqrt(2), facts.tall * math.sqrt(2)
    ratios = tuple(one for one in RATIOS if low <= one <= high) or (1.0,)
    sizes = f"{scale * STRIDES[0]} to {scale * STRIDES[-1]} pixels, {octave} a level"
    return (scale, octave, ratios), [
        Rule(
            "anchor sizes",
            sizes,
            f"the smallest is next to the size that one in ten objects does not reach, {small:.0f} "
            f"pixels; {octave} a level, as sizes span {math.log2(large / small):.1f} octaves",
        ),
        Rule(
            "anchor ratios",
            ", ".join(f"{one:.2g}" for one in ratios),
            "height by width, around the middle 80 % of the objects: "
            f"{facts.narrow:.2g} to {facts.tall:.2g}",
        ),
    ]


def _flip(facts: Facts) -> tuple[bool, Rule]:
    for name in facts.classes:
        word = next(filter(MIRRORED.fullmatch, re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", name)), "")
        if word or len(name) == 1 or name.isdecimal():
            why = f"class {name!r} may be another one when it is mirrored"
            return False, Rule("flip", "none", why)
    return True, Rule("flip", "half of the images, horizontally", "no class is named by its side")


def _batch(facts: Facts, machine: Machine, wish: Wish, pixels: int) -> tuple[int, Rule]:
    if wish.batch is not None:
        return wish.batch, Rule("batch", f"{wish.batch} images", "as asked for")
    fits = int(machine.memory / 2 / (PIXEL_BYTES[wish.model] * pixels))
    most = MOST_IMAGES[machine.device]
    batch = max(1, min(fits, most, facts.images))
    why = (
        f"at most {most} on this device, half of its free memory at {PIXEL_BYTES[wish.model]} "
        f"bytes a pixel, and the {facts.images} images"
    )
    return batch, Rule("batch", f"{batch} images", why)


def _layer_decay(wish: Wish) -> tuple[float, Rule]:
    chosen = LAYER_DECAY if wish.starts else 1.0
    why = f"{LAYER_DECAY:g} for trained weights, whose first layers need to change least"
    if wish.layer_decay is not None:
        chosen, why = wish.layer_decay, "as asked for"
    return chosen, Rule("layer decay", f"{chosen:g}", why)


def _rate(wish: Wish, batch: int) -> tuple[float, Rule]:
    rate, base = RATES[wish.model == SMALL, wish.starts]
    chosen = float(f"{rate * math.sqrt(batch / base):.3g}")
    start = "trained" if wish.starts else "random"
    why = f"{rate:g} for this model from {start} weights at a batch of {base}"
    why += ", times the square root of the batch by that"
    return chosen, Rule("learning rate", f"{chosen:g}", why)


def _class_weights(facts: Facts) -> tuple[tuple[float, ...], list[Rule]]:
    if not facts.shares:
        return (), []
    largest = max(facts.shares)
    seen = sorted(share for share in facts.shares if share)
    if largest <= 0.5 or len(seen) < 2:
        why = "equal, as no class has more than half of the labelled pixels"
        return (), [Rule("class weights", "1", why)]
    median = seen[len(seen) // 2]
    weights = tuple(
        round(min(max(math.sqrt(median / share), 0.1), 5), 2) if share else 1.0
        for share in facts.shares
    )
    name = facts.classes[facts.shares.index(largest)]
    why = (
        f"{name!r} has {largest:.0%} of the labelled pixels: the square root of the median share "
        "by the class's, from 0.1 to 5"
    )
    return weights, [Rule("class weights", ", ".join(f"{one:g}" for one in weights), why)]


def _workers(machine: Machine, wish: Wish, pixels: int) -> tuple[int, Rule]:
    if wish.workers is not None:
        return wish.workers, Rule("workers", str(wish.workers), "as asked for")
    small = machine.device == "cpu" and pixels <= 512 * 512
    count = 0 if small else max(1, min(8, machine.cores // 2))
    why = "on CPUs none for small images, which are read faster than handed over; else half of the "
    return count, Rule("workers", str(count), f"{why}cores, at most 8")
