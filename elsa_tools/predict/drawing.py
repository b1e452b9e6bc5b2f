"""Paints results by supervision, for models without a framework's visualiser."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from elsa_core.runtime.packages import need

from .results import Detections, Result, Segmentation

OPACITY = 0.45
# A region of a label map is named if it is its class's largest or has this share of the picture.
NAMED = 0.02


class Painter:
    """Paints results in one colour for each class.

    Args:
        classes: their names; one called "background" stays as it is in a label map.
        colours: RGB.

    Raises UsageError where supervision is missing.
    """

    def __init__(self, classes: Sequence[str], colours: Sequence[tuple[int, int, int]]) -> None:
        self.classes = classes
        self.library: Any = need("supervision", "drawing what an exported model finds")
        self.font = _font_file()
        self.colours = self._palette(colours)
        # Black or white: the one that is easier to read on the class's colour.
        self.text_colours = self._palette([_readable(colour) for colour in colours])

    def draw(self, image: np.ndarray, result: Result) -> np.ndarray:
        """The image [H, W, 3], 8 bits, blue first, with a result painted on it."""
        if isinstance(result, Segmentation):
            return self._draw_labels(image, result)
        pairs = zip(result.labels.tolist(), result.scores.tolist(), strict=True)
        names = [f"{self.classes[label]} {score:.0%}" for label, score in pairs]
        return self.draw_objects(image, result, names)

    def draw_objects(
        self, image: np.ndarray, result: Detections, names: Sequence[str]
    ) -> np.ndarray:
        """Variant of `draw` with a text of its own for each object."""
        scene, found = image.copy(), result.to_supervision(self.classes)
        thickness, size = _line(image), _font(image)
        if found.mask is not None:
            scene = self._paint(scene, found, thickness)
        boxes = self.library.BoxAnnotator(self.colours, thickness=thickness)
        return self._name(boxes.annotate(scene, found), found, names, "TOP_LEFT", size)

    def _draw_labels(self, image: np.ndarray, result: Segmentation) -> np.ndarray:
        found = result.to_supervision(self.classes)
        found = found[found.data["class_name"] != "background"]
        scene = self._paint(image.copy(), found, _line(image))
        regions = self._regions(found)
        names = [self.classes[label] for label in regions.class_id]
        return self._name(scene, regions, names, "CENTER", _font(image))

    def _paint(self, scene: np.ndarray, found: Any, thickness: int) -> np.ndarray:
        scene = self.library.MaskAnnotator(self.colours, OPACITY).annotate(scene, found)
        outlines = self.library.PolygonAnnotator(self.colours, thickness=thickness - 1)
        painted: np.ndarray = outlines.annotate(scene, found)
        return painted

    def _name(
        self, scene: np.ndarray, found: Any, names: Sequence[str], place: str, size: int
    ) -> np.ndarray:
        annotator = self.library.RichLabelAnnotator(
            self.colours,
            text_color=self.text_colours,
            font_path=self.font,
            font_size=size,
            text_padding=max(2, size // 4),
            text_position=self.library.Position[place],
            smart_position=True,
        )
        named: np.ndarray = annotator.annotate(scene, found, names)
        return named

    def _regions(self, found: Any) -> Any:
        """The regions to name, each as a box around the pixel that is farthest from its border."""
        import cv2

        boxes, labels = [], []
        for mask, label in zip(found.mask, found.class_id, strict=True):
            _, numbers, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
            areas = statistics[1:, cv2.CC_STAT_AREA]
            for region in np.flatnonzero((areas >= NAMED * mask.size) | (areas == areas.max())):
                x, y, width, height = statistics[region + 1, :4]
                inside = numbers[y : y + height, x : x + width] == region + 1
                padded = np.pad(inside.astype(np.uint8), 1)
                distance = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
                row, column = np.unravel_index(distance.argmax(), distance.shape)
                boxes.append([x + column, y + row, x + column + 1, y + row + 1])
                labels.append(label)
        if not boxes:
            return self.library.Detections.empty()
        return self.library.Detections(np.array(boxes, np.float32), class_id=np.array(labels))

    def _palette(self, colours: Sequence[tuple[int, int, int]]) -> Any:
        return self.library.ColorPalette([self.library.Color(*colour) for colour in colours])


def _readable(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    brightness = float(np.dot(colour, (0.299, 0.587, 0.114)))
    return (0, 0, 0) if brightness > 140 else (255, 255, 255)


def _font_file() -> str:
    """Of matplotlib, which supervision needs: with more letters than Pillow's own."""
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def _line(image: np.ndarray) -> int:
    return max(2, round(min(image.shape[:2]) / 300))


def _font(image: np.ndarray) -> int:
    return max(13, round(min(image.shape[:2]) / 38))
