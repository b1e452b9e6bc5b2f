"""Draws images of handwritten digits on photographs, with the pixels that belong to each digit.

The digits are scikit-learn's 1,797 (8x8 grey values), the photographs are those that the
scikit-image wheel carries; nothing is downloaded. Digits and photographs of the two parts are
disjoint.
"""

import errno
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import skimage
from sklearn.datasets import load_digits

PHOTOGRAPHS = {
    "training": (
        "astronaut.png", "brick.png", "coffee.png", "coins.png", "gravel.png",
        "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "motorcycle_right.png",
        "retina.jpg", "rocket.jpg",
    ),
    "validation": ("camera.png", "chelsea.png", "grass.png", "moon.png"),
}  # fmt: skip
PARTS = tuple(PHOTOGRAPHS)

OBJECTS = (2, 4)  # digits an image, both ends included
HEIGHT = (0.42, 0.58)  # of a digit's ink before the rotation, as a fraction of the image size
ROTATION = 12.0  # degrees to either side, so that 6 and 9 stay apart
OPACITY = (0.85, 1.0)
MIN_VISIBLE = 0.9  # fraction of each digit that the later ones leave to be seen
ATTEMPTS = 100  # digits and places tried for one object
DIMMING = (0.45, 0.75)  # of the photographs, so that all digits are brighter than what they cover
MIN_CONTRAST = 90.0  # luminance of the ink over that of what lies under it, in grey levels
MIN_DISTANCE = 100.0  # between the colours of two digits of an image, in RGB
INK = 0.45  # ink above this fraction of the full value belongs to the digit
EDGE = 0.1  # half width of the soft edge, in the same unit
CELL = 16  # pixels that one of the 8x8 cells becomes before it is scaled and rotated
BGR_TO_LUMINANCE = np.array([0.114, 0.587, 0.299])


class Sample(NamedTuple):
    """One image.

    `image` is BGR (size, size, 3) uint8, `owner` (size, size) uint8 holds 0 or 1 + the position
    in `digit_indices` (rows of scikit-learn's table) of the digit that is seen there.
    """

    image: np.ndarray
    owner: np.ndarray
    digit_indices: list[int]
    photograph: str


def split_digits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of the digit table for each part: the last fifth of every class is for validation.

    The table is ordered by writer, so that its tail holds mostly writers of its own.
    """
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held_out[rows[-(len(rows) // 5) :]] = True
    return {"training": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}


class Painter:
    """Draws the images of one part, `size` pixels wide and high."""

    def __init__(self, part: str, size: int, seed: int) -> None:
        table = load_digits()
        self.ink = table.images / 16.0
        self.labels = table.target
        self.rows = split_digits(self.labels)[part]
        self.part, self.size, self.seed = part, size, seed
        self._photographs: dict[str, np.ndarray] = {}

    def draw(self, number: int) -> Sample:
        """Image `number` (from 0), which does not depend on how many are drawn.

        Raises OSError where the photograph cannot be read.
        """
        rng = np.random.default_rng([self.seed, PARTS.index(self.part), number])
        name = str(rng.choice(PHOTOGRAPHS[self.part]))
        image = self._background(rng, name)
        owner = np.zeros((self.size, self.size), dtype=np.uint8)
        indices: list[int] = []
        areas: list[int] = []
        colors: list[np.ndarray] = []
        for _ in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
            for _ in range(ATTEMPTS):
                index = int(rng.choice(self.rows))
                glyph = self._glyph(rng, index)
                solid = glyph > INK
                window = _window(rng, glyph.shape, self.size)
                if _leaves_visible(owner, window, solid, areas):
                    colors.append(_ink_color(rng, image[window], colors))
                    alpha = rng.uniform(*OPACITY) * np.clip((glyph - INK) / (2 * EDGE) + 0.5, 0, 1)
                    image[window] += alpha[..., None] * (colors[-1] - image[window])
                    indices.append(index)
                    areas.append(int(solid.sum()))
                    owner[window][solid] = len(indices)
                    break
        return Sample(np.rint(image).astype(np.uint8), owner, indices, name)

    def _background(self, rng: np.random.Generator, name: str) -> np.ndarray:
        if name not in self._photographs:
            self._photographs[name] = _read_photograph(name)
        photograph = self._photographs[name]
        height, width = photograph.shape[:2]
        short = min(height, width)
        side = int(rng.integers(min(short, max(self.size, int(0.4 * short))), short + 1))
        y, x = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        crop = photograph[y : y + side, x : x + side]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        method = cv2.INTER_AREA if side > self.size else cv2.INTER_CUBIC
        crop = cv2.resize(np.ascontiguousarray(crop), (self.size, self.size), interpolation=method)
        return crop * rng.uniform(*DIMMING)

    def _glyph(self, rng: np.random.Generator, index: int) -> np.ndarray:
        """Ink in 0..1 of a scaled and rotated digit, cut to the box of what is visible."""
        ink = np.pad(self.ink[index], 1).astype(np.float32)
        ink = cv2.resize(ink, None, fx=CELL, fy=CELL, interpolation=cv2.INTER_CUBIC)
        left, top, width, height = cv2.boundingRect((ink > INK).astype(np.uint8))
        scale = rng.uniform(*HEIGHT) * self.size / height
        canvas = int(np.ceil(np.hypot(width, height) * scale)) + 4
        centre = (left + (width - 1) / 2, top + (height - 1) / 2)
        matrix = cv2.getRotationMatrix2D(centre, rng.uniform(-ROTATION, ROTATION), scale)
        matrix[:, 2] += (canvas - 1) / 2 - np.array(centre)
        ink = cv2.warpAffine(ink, matrix, (canvas, canvas), flags=cv2.INTER_LINEAR)
        left, top, width, height = cv2.boundingRect((ink > INK - EDGE).astype(np.uint8))
        return ink[top : top + height, left : left + width]


def _window(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> tuple[slice, slice]:
    y, x = (int(rng.integers(0, size - extent + 1)) for extent in shape)
    return slice(y, y + shape[0]), slice(x, x + shape[1])


def _leaves_visible(
    owner: np.ndarray, window: tuple[slice, slice], solid: np.ndarray, areas: list[int]
) -> bool:
    """Whether all digits so far stay visible enough if `solid` covers the window."""
    visible = np.bincount(owner.ravel(), minlength=len(areas) + 1)[1:]
    hidden = np.bincount(owner[window][solid], minlength=len(areas) + 1)[1:]
    return bool((visible - hidden >= MIN_VISIBLE * np.array(areas)).all())


def _ink_color(
    rng: np.random.Generator, window: np.ndarray, others: list[np.ndarray]
) -> np.ndarray:
    """A random BGR colour, brighter than the window and unlike the other digits' colours."""
    under = BGR_TO_LUMINANCE @ window.mean((0, 1))
    colors = rng.uniform(0, 255, (64, 3))
    quality = (colors @ BGR_TO_LUMINANCE - under) / MIN_CONTRAST
    for other in others:
        quality = np.minimum(quality, np.linalg.norm(colors - other, axis=1) / MIN_DISTANCE)
    return colors[np.minimum(quality, 1).argmax()]  # the first good one, or else the best


def _read_photograph(name: str) -> np.ndarray:
    """BGR (H, W, 3) uint8 from scikit-image's own folder; its loaders might download."""
    path = Path(skimage.__file__).parent / "data" / name
    photograph = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if photograph is None:
        reason = "no readable photograph here, reinstall scikit-image==0.25.2"
        raise FileNotFoundError(errno.ENOENT, reason, str(path))
    return photograph
