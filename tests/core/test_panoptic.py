"""Panoptic quality: cases counted by hand, and COCO's reference where it is installed."""

import numpy as np
import pytest
from PIL import Image

from elsa_core.data.panoptic import PanopticQuality, to_colours, to_ids

CATEGORIES = {1: {"isthing": 1}, 2: {"isthing": 1}, 3: {"isthing": 0}}


def stripes(*widths):
    """Segments 1, 2, ... side by side, one row high; a negative width is void."""
    numbers, number = [], 0
    for width in widths:
        number += width > 0
        numbers += [number if width > 0 else 0] * abs(width)
    return np.array([numbers])


def quality(truth, categories, found, predicted, crowds=()):
    segments = [
        {"id": number, "category_id": category, "iscrowd": int(number in crowds)}
        for number, category in categories.items()
    ]
    result = PanopticQuality()
    result.add(truth, segments, found, predicted)
    return {key: counts.tolist() for key, counts in result.counts.items() if counts.any()}


def test_colours_are_numbers():
    ids = np.array([[0, 1, 255, 256, 65536, 256**3 - 1]])
    assert to_colours(ids)[0, 3:5].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert np.array_equal(to_ids(to_colours(ids)), ids)


@pytest.mark.parametrize(
    "found, predicted, crowds, counts",
    [
        # [IoU, matches, surplus, missing] of a truth of 6 pixels of 1, 4 of 2, and 2 of nothing.
        (stripes(6, 4, -2), {1: 1, 2: 2}, (), {1: [1, 1, 0, 0], 2: [1, 1, 0, 0]}),
        (stripes(8, 2, -2), {1: 1, 2: 2}, (), {1: [6 / 8, 1, 0, 0], 2: [0, 0, 1, 1]}),
        (stripes(6, 4, -2), {1: 2, 2: 2}, (), {1: [0, 0, 0, 1], 2: [1, 1, 1, 0]}),
        # Pixels of the truth's void do not count.
        (stripes(6, 6), {1: 1, 2: 2}, (), {1: [1, 1, 0, 0], 2: [1, 1, 0, 0]}),
        (stripes(6, 4, 2), {1: 1, 2: 2, 3: 1}, (), {1: [1, 1, 0, 0], 2: [1, 1, 0, 0]}),
        # A crowd is neither missing nor matched, and excuses what lies on it.
        (stripes(6, -4, -2), {1: 1}, (2,), {1: [1, 1, 0, 0]}),
        (stripes(6, 2, 2, -2), {1: 1, 2: 2, 3: 2}, (2,), {1: [1, 1, 0, 0]}),
        (stripes(6, 4, -2), {1: 1, 2: 3}, (2,), {1: [1, 1, 0, 0], 3: [0, 0, 1, 0]}),
    ],
)
def test_matches(found, predicted, crowds, counts):
    got = quality(stripes(6, 4, -2), {1: 1, 2: 2}, found, predicted, crowds)
    assert got == {key: pytest.approx(value) for key, value in counts.items()}


def test_average_is_over_the_categories_that_occur():
    result = PanopticQuality()
    result.counts |= {1: np.array([1.8, 2, 1, 1]), 2: np.array([0, 0, 1, 0.0])}
    assert result.average([1, 3]) == pytest.approx({"pq": 0.6, "sq": 0.9, "rq": 2 / 3, "n": 1})
    assert result.average([1, 2]) == pytest.approx({"pq": 0.3, "sq": 0.45, "rq": 1 / 3, "n": 2})
    assert result.average([3]) == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}


def test_same_as_the_reference(tmp_path):
    reference = pytest.importorskip("panopticapi.evaluation")
    random, ours, theirs = np.random.default_rng(0), PanopticQuality(), reference.PQStat()
    for _ in range(50):
        truth = np.kron(random.integers(0, 7, (6, 6)), np.ones((4, 5), int))
        wrong = random.random(truth.shape) < 0.3 * random.random()
        found = np.where(wrong, random.integers(0, 8, truth.shape), truth)
        segments = [
            {
                "id": number,
                "category_id": int(random.integers(1, 4)),
                "iscrowd": int(random.random() < 0.15),
                "area": int((truth == number).sum()),
            }
            for number in np.unique(truth).tolist()
            if number and random.random() < 0.9
        ]
        right = {one["id"]: one["category_id"] for one in segments}
        predicted = {
            number: right.get(number, 1) if random.random() < 0.8 else int(random.integers(1, 4))
            for number in np.unique(found).tolist()
            if number
        }
        ours.add(truth, segments, found, predicted)
        for name, ids in (("truth.png", truth), ("found.png", found)):
            Image.fromarray(to_colours(ids)).save(tmp_path / name)
        listed = [{"id": number, "category_id": key} for number, key in predicted.items()]
        pair = (
            {"image_id": 1, "file_name": "truth.png", "segments_info": segments},
            {"image_id": 1, "file_name": "found.png", "segments_info": listed},
        )
        theirs += reference.pq_compute_single_core(0, [pair], tmp_path, tmp_path, CATEGORIES)
    for kind, members in ((None, [1, 2, 3]), (True, [1, 2]), (False, [3])):
        expected, _ = theirs.pq_average(CATEGORIES, kind)
        assert ours.average(members) == pytest.approx(expected)
