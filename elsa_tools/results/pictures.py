"""Pictures of what is in an image beside what was found, as JPEG."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from pycocotools.mask import decode

from elsa_tools.predict.drawing import Painter
from elsa_tools.predict.inputs import read_image
from elsa_tools.predict.results import Detections, Segmentation, palette

from .analysis import ImageResult, Shape

LONGEST, LEAST = 720, 400  # pixels of a picture's longer and shorter side, as far as both go
QUALITY = 82
# Right and wrong: blue and orange, which all kinds of colour vision tell apart.
COLOURS = ((64, 148, 255), (255, 140, 0))


class Pictures:
    """Draws the truth and what was found; missed objects and wrong detections are orange.

    Args:
        folder: of the images.
        classes: names by label.
    """

    def __init__(self, folder: str, classes: Sequence[str]) -> None:
        self.folder, self.classes = folder, classes
        self.objects = Painter(("right", "wrong"), COLOURS)
        # The last label stands for no class; pixels of a "background" stay as they are.
        self.maps = Painter((*classes, "background"), palette(len(classes) + 1))

    def draw(self, one: ImageResult) -> tuple[bytes, bytes]:
        """Return two JPEG files: what is there and what was found.

        Raises:
            UsageError: the image cannot be read.
        """
        image = read_image(f"{self.folder}/{one.file_name}")
        first, second = (
            self._labels(image, side) if isinstance(side, np.ndarray) else self._shapes(image, side)
            for side in one.drawn()
        )
        return first, second

    def _labels(self, image: np.ndarray, labels: np.ndarray) -> bytes:
        scene = _fitting(image)
        size = scene.shape[1::-1]
        labels = cv2.resize(labels.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        return _jpeg(self.maps.draw(scene, Segmentation(labels)))

    def _shapes(self, image: np.ndarray, shapes: Sequence[Shape]) -> bytes:
        scene = _fitting(image)
        size = scene.shape[1::-1]
        factor = np.array([size[0] / image.shape[1], size[1] / image.shape[0]] * 2)
        boxes = np.array([one.box for one in shapes], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = None
        if shapes and all(one.mask is not None for one in shapes):
            masks = np.stack(
                [
                    cv2.resize(decode(one.mask), size, interpolation=cv2.INTER_NEAREST) > 0
                    for one in shapes
                ]
            )
        wrong = np.array([one.wrong for one in shapes], dtype=int)
        scores = np.array([1.0 if one.score is None else one.score for one in shapes])
        found = Detections(wrong, scores, boxes * factor, masks)
        return _jpeg(self.objects.draw_objects(scene, found, list(map(self._name, shapes))))

    def _name(self, one: Shape) -> str:
        name = self.classes[one.label]
        if one.score is None:
            return f"missed: {name}" if one.wrong else name
        return f"wrong: {name} {one.score:.0%}" if one.wrong else f"{name} {one.score:.0%}"


def _fitting(image: np.ndarray) -> np.ndarray:
    """Return the image enlarged or reduced to the size of pictures."""
    height, width = image.shape[:2]
    factor = min(LONGEST / max(height, width), max(1.0, LEAST / min(height, width)))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


def _jpeg(image: np.ndarray) -> bytes:
    good, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert good
    return data.tobytes()
