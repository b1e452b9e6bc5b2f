"""The images of the digits data set: what is drawn and what is recorded of it."""

import os

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from examples.digits import painter as digit_painter
from examples.digits.dataset import make_dataset
from examples.digits.painter import PHOTOGRAPHS, Painter, split_digits


def test_split_is_a_stratified_partition_of_all_digits():
    labels = load_digits().target
    rows = split_digits(labels)
    together = np.concatenate([rows["training"], rows["validation"]])
    assert sorted(together) == list(range(1797))
    share = np.bincount(labels[rows["validation"]]) / np.bincount(labels)
    assert (np.abs(share - 0.2) < 0.01).all()


def test_each_digit_and_background_is_the_recorded_one(monkeypatch):
    # Photographs become flat grey levels; upright digits of one size are compared with the table.
    levels = dict(zip(PHOTOGRAPHS["validation"], (20, 45, 100, 220), strict=True))
    flat = {name: np.full((200, 200, 3), level, np.uint8) for name, level in levels.items()}
    monkeypatch.setattr(digit_painter, "_read_photograph", flat.__getitem__)
    monkeypatch.setattr(digit_painter, "ROTATION", 0.0)
    monkeypatch.setattr(digit_painter, "MIN_VISIBLE", 1.0)
    ink = load_digits().images / 16.0
    painter = Painter("validation", 128, seed=5)
    overlaps = []
    for number in range(20):
        sample = painter.draw(number)
        dimmest, brightest = levels[sample.photograph] * np.array(digit_painter.DIMMING)
        background = np.median(sample.image[sample.owner == 0])
        assert dimmest - 1 <= background <= brightest + 1
        for i, index in enumerate(sample.digit_indices, 1):
            seen = (sample.owner == i).astype(np.uint8)
            x, y, width, height = cv2.boundingRect(seen)
            table = cv2.resize(np.pad(ink[index], 1), (320, 320), interpolation=cv2.INTER_CUBIC)
            table = (table > digit_painter.INK).astype(np.uint8)
            left, top, across, down = cv2.boundingRect(table)
            table = cv2.resize(table[top : top + down, left : left + across], (width, height))
            seen = seen[y : y + height, x : x + width]
            overlaps.append((seen & table).sum() / (seen | table).sum())
    assert len(overlaps) > 40 and min(overlaps) > 0.8


def test_hidden_digits_stay_visible_enough(monkeypatch):
    full = []
    glyph = Painter._glyph

    def record(self, rng, index):
        ink = glyph(self, rng, index)
        full.append((index, int((ink > digit_painter.INK).sum())))
        return ink

    monkeypatch.setattr(Painter, "_glyph", record)
    painter = Painter("training", 96, seed=0)
    occluded = 0
    for number in range(30):
        full.clear()
        sample = painter.draw(number)
        for i, index in enumerate(sample.digit_indices, 1):
            visible = (sample.owner == i).sum()
            areas = [area for row, area in full if row == index]
            assert visible >= digit_painter.MIN_VISIBLE * min(areas)
            occluded += visible < max(areas)
    assert occluded > 5


def test_missing_photograph_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(digit_painter.PHOTOGRAPHS, "training", ("no_such.png",))
    with pytest.raises(FileNotFoundError, match=r"scikit-image==0\.25\.2.*no_such\.png"):
        make_dataset(tmp_path / "data", progress=False)
    assert os.listdir(tmp_path) == []
