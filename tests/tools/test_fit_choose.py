"""The rules by which `elsa fit` chooses: functions of facts."""

import math

import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS

from elsa_core.runtime.errors import UsageError
from elsa_tools.fit.choose import choose
from elsa_tools.fit.config_mm import schedule
from elsa_tools.fit.facts import Facts, Machine
from elsa_tools.fit.length import Timing
from elsa_tools.fit.wish import Wish

GIB = 2**30
CPU = Machine("cpu", 8 * GIB, 2, "CPU")
GPU = Machine("cuda", 20 * GIB, 16, "a GPU")
# Images of 640x480 with objects of 60 to 240 pixels.
PHOTOGRAPHS = Facts(1000, 200, 480, 4 / 3, ("cat", "dog"), 3000, 1 / 8, 1 / 2, 0.5, 2.0, 7)
WISH = Wish("instances", "small")


def with_(facts=PHOTOGRAPHS, **values):
    return Facts(**{**vars(facts), **values})


@pytest.mark.parametrize(
    ("facts", "machine", "size"),
    [
        (PHOTOGRAPHS, CPU, (320, 448)),
        (PHOTOGRAPHS, GPU, (480, 640)),
        (with_(short=2000), GPU, (800, 1088)),
        (with_(short=160, aspect=1, small=0.3), CPU, (160, 160)),
        (with_(small=0.05), CPU, (480, 640)),  # 24 pixels of 480
        (with_(small=0.01), CPU, (640, 864)),  # the device's largest
        (with_(short=100, small=0.01), GPU, (192, 256)),  # twice the images' own
        (with_(short=20, small=0.5), CPU, (64, 96)),
    ],
)
def test_image_size(facts, machine, size):
    chosen = choose(facts, machine, WISH)
    assert (chosen.short, chosen.long) == size
    assert [one / chosen.short for one in chosen.shorts] == pytest.approx([7 / 8, 1, 9 / 8], 0.03)


@pytest.mark.parametrize(
    ("facts", "scale", "octave", "ratios"),
    [
        (PHOTOGRAPHS, 8, 1, (0.5, 1, 2)),  # 40 to 160 pixels
        (with_(large=0.3), 8, 2, (0.5, 1, 2)),
        (with_(small=0.05, large=0.9), 6, 1, (0.5, 1, 2)),
        (with_(narrow=1, tall=2.5), 8, 1, (1, 2, 3)),
        (with_(narrow=0.1, tall=0.2), 8, 1, (0.2,)),
    ],
)
def test_anchors(facts, scale, octave, ratios):
    chosen = choose(facts, CPU, WISH)
    assert (chosen.scale, chosen.octave, chosen.ratios) == (scale, octave, ratios)
    assert [len(level) for level in chosen.sizes] == [octave] * 5
    assert chosen.sizes[0][0] == 4 * scale and chosen.sizes[-1][0] == 64 * scale


@pytest.mark.parametrize(
    ("names", "flips"),
    [
        (("cat", "dog"), True),
        (("0", "1"), False),
        (("a", "b"), False),
        (("left_hand", "hand"), False),
        (("TrafficSign",), False),
        (("design", "bright"), True),
        (("12",), False),
    ],
)
def test_flip(names, flips):
    assert choose(with_(classes=names), CPU, WISH).flip is flips


def test_batch_and_its_learning_rate():
    assert choose(PHOTOGRAPHS, CPU, WISH).batch == 4
    assert choose(with_(images=3), CPU, WISH).batch == 3
    tight = choose(PHOTOGRAPHS, Machine("cuda", 4 * GIB, 8, ""), Wish("instances", "t"))
    assert 1 <= tight.batch < choose(PHOTOGRAPHS, GPU, WISH).batch == 16
    asked = choose(PHOTOGRAPHS, CPU, Wish("instances", "small", batch=16))
    assert asked.rate == pytest.approx(2 * choose(PHOTOGRAPHS, CPU, WISH).rate)


@pytest.mark.parametrize(
    ("wish", "iterations"),
    [
        (Wish("boxes", "small"), 36 * 250),
        (Wish("boxes", "small", starts=True), 12 * 250),
        (Wish("boxes", "small", epochs=2), 500),
    ],
)
def test_length_of_epochs(wish, iterations):
    chosen = choose(PHOTOGRAPHS, CPU, wish)
    assert chosen.iterations == iterations
    assert math.ceil(iterations / chosen.evaluate) == 10
    assert choose(with_(images=8), CPU, Wish("boxes", "small")).iterations == 600


@pytest.mark.parametrize("timing", [Timing(8, 0.2, 0.03, 20), Timing(30, 1.5, 0.2, 60)])
@pytest.mark.parametrize("minutes", [5, 60])
def test_length_of_minutes(timing, minutes):
    chosen = choose(PHOTOGRAPHS, CPU, Wish("boxes", "small", minutes=minutes), timing)
    count = math.ceil(chosen.iterations / chosen.evaluate)
    training = chosen.iterations * timing.iteration
    passes = (1 + chosen.averaged) * count + 1
    evaluating = passes * PHOTOGRAPHS.val_images * timing.image
    total = timing.spent + 2 * timing.startup + training + evaluating
    assert 0.8 * 60 * minutes < total < 60 * minutes
    assert 1 <= count <= 5


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        (Wish("boxes", "small", epochs=1, minutes=1), "--epochs and --minutes exclude"),
        (Wish("boxes", "small", epochs=0), "--epochs must be above 0, got 0"),
        (Wish("boxes", "small", minutes=math.nan), "--minutes must be above 0, got nan"),
        (Wish("boxes", "small", batch=1001), "--batch must be at most the 1000 training images"),
        (Wish("boxes", "small", workers=-1), "--workers must be 0 or more, got -1"),
        (Wish("boxes", "small", minutes=0.5), "--minutes 0.5 is too short: .* at least 1.1 min"),
    ],
)
def test_wishes_that_are_not_possible(wish, sentence):
    with pytest.raises(UsageError, match=sentence):
        choose(PHOTOGRAPHS, CPU, wish, Timing(8, 0.2, 0.03, 20))


def test_class_weights():
    wish = Wish("semantic", "small")
    maps = Facts(100, 20, 160, 1, ("background", "a", "b", "c"), shares=(0.9, 0.05, 0.05, 0))
    assert choose(maps, CPU, wish).weights == (0.24, 1, 1, 1)
    assert choose(with_(maps, shares=(0.4, 0.3, 0.2, 0.1)), CPU, wish).weights == ()


@pytest.mark.parametrize("iterations", [1, 2, 17, 100])
def test_openmmlab_reaches_the_rate(iterations):
    chosen = choose(with_(images=4 * iterations), CPU, Wish("instances", "small", epochs=1))
    assert chosen.iterations == iterations
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], chosen.rate)
    schedulers = [
        PARAM_SCHEDULERS.build(one, default_args=dict(optimizer=optimizer))
        for one in schedule(chosen)
    ]
    rates = []
    for _ in range(iterations):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for one in schedulers:
            one.step()
    assert max(rates) == pytest.approx(chosen.rate)
    assert iterations < 24 or rates[0] == pytest.approx(chosen.rate / 100)
