"""Results of a model for one image, common to both frameworks, and their form in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True)
class Detections:
    """Objects, best first.

    ``labels`` [N], ``scores`` [N], ``boxes`` [N, 4] in pixels (x1, y1, x2, y2), ``masks``
    [N, H, W] of bool or None. ``size`` is (height, width) of an image that is larger than the
    masks, None for one of their size.
    """

    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None = None
    size: tuple[int, int] | None = None

    def above(self, score: float) -> Detections:
        """Those with at least this score, best first."""
        order = np.argsort(-self.scores, kind="stable")
        keep = order[self.scores[order] >= score]
        masks = None if self.masks is None else self.masks[keep]
        return Detections(self.labels[keep], self.scores[keep], self.boxes[keep], masks)

    def enlarged(self, factor: int) -> Detections:
        masks = self.masks
        if masks is not None:
            masks = masks.repeat(factor, axis=1).repeat(factor, axis=2)
        return Detections(self.labels, self.scores, self.boxes * factor, masks)

    def scaled(self, image: np.ndarray, size: tuple[int, int]) -> Detections:
        """Of ``image`` [H, W, 3], for one of ``size`` (height, width) that it was made of."""
        factors = np.array([size[1] / image.shape[1], size[0] / image.shape[0]] * 2)
        boxes = (self.boxes * factors).astype(self.boxes.dtype)
        return Detections(self.labels, self.scores, boxes, self.masks, size)

    def record(self, classes: Sequence[str]) -> dict[str, Any]:
        """{"instances": [...]}; masks are COCO's run-length encoding."""
        entries = []
        for index, label in enumerate(self.labels.tolist()):
            entry = {
                "class": classes[label],
                "id": label,
                "score": round(float(self.scores[index]), 6),
                "box": [round(float(value), 2) for value in self.boxes[index]],
            }
            if self.masks is not None:
                entry["mask"] = _encode(self.masks[index], self.size)
            entries.append(entry)
        return {"instances": entries}

    def to_coco(self, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """COCO's results format, for `pycocotools.coco.COCO.loadRes` of a list over all images.

        Args:
            image_id: of the annotations.
            category_ids: of the annotations, one for each class.
        """
        corners = self.boxes.astype(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        entries = [
            {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
            for label, box, score in zip(
                self.labels.tolist(), boxes.tolist(), self.scores.tolist(), strict=True
            )
        ]
        if self.masks is not None:
            for entry, mask in zip(entries, self.masks, strict=True):
                entry["segmentation"] = _encode(mask, self.size)
        return entries

    def to_supervision(self, classes: Sequence[str]) -> supervision.Detections:
        """`supervision.Detections`, with ``classes`` as its ``class_name``."""
        from supervision import Detections

        return Detections(
            xyxy=self.boxes.astype(np.float32),
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels.astype(int),
            data={"class_name": np.array(classes)[self.labels]},
        )


@dataclass(frozen=True)
class Segmentation:
    """``labels`` [H, W]: the class of each pixel."""

    labels: np.ndarray

    def enlarged(self, factor: int) -> Segmentation:
        return Segmentation(self.labels.repeat(factor, axis=0).repeat(factor, axis=1))

    def scaled(self, image: np.ndarray, size: tuple[int, int]) -> Segmentation:
        """Of ``image`` [H, W, 3], for one of ``size`` (height, width) that it was made of."""
        rows, columns = (
            np.arange(new) * old // new for new, old in zip(size, image.shape, strict=False)
        )
        return Segmentation(self.labels[rows[:, None], columns])

    def record(self, classes: Sequence[str]) -> dict[str, Any]:
        """{"segmentation": {"classes": [...]}}, the class of most pixels first."""
        labels, pixels = np.unique(self.labels, return_counts=True)
        pairs = sorted(zip(labels.tolist(), pixels.tolist(), strict=True), key=lambda p: -p[1])
        entries = [{"class": classes[i], "id": i, "pixels": count} for i, count in pairs]
        return {"segmentation": {"classes": entries}}

    def to_supervision(self, classes: Sequence[str]) -> supervision.Detections:
        """`supervision.Detections`: the mask of each class that the image has, and its box."""
        from supervision import Detections, mask_to_xyxy

        labels = np.unique(self.labels)
        masks = self.labels == labels[:, None, None]
        return Detections(
            xyxy=mask_to_xyxy(masks).astype(np.float32),
            mask=masks,
            class_id=labels.astype(int),
            data={"class_name": np.array(classes)[labels]},
        )

    def label_map(self) -> np.ndarray:
        """For a PNG of one channel: 8 bits, or 16 where there are more than 256 classes."""
        wide = self.labels.size and self.labels.max() > 255
        return self.labels.astype(np.uint16 if wide else np.uint8)


Result = Detections | Segmentation


def enlarge(
    image: np.ndarray, result: Result, least: int = 480, most: int = 4000
) -> tuple[np.ndarray, Result]:
    """Enlarges image [H, W, 3] and result by a whole factor, so that labels fit on small images.

    Args:
        least: pixels of the shorter side to aim for.
        most: pixels that the longer side may have; takes precedence.
    """
    short, long = sorted(image.shape[:2])
    factor = max(1, min(round(least / short), most // long))
    if factor == 1:
        return image, result
    import cv2

    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return image, result.enlarged(factor)


def reduce(image: np.ndarray, most: int) -> np.ndarray:
    """An image [H, W, 3] of at most ``most`` pixels, of the same shape."""
    import cv2

    factor = (most / (image.shape[0] * image.shape[1])) ** 0.5
    if factor >= 1:
        return image
    height, width = (max(1, int(side * factor)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def _encode(mask: np.ndarray, size: tuple[int, int] | None) -> dict[str, Any]:
    from pycocotools import mask as coco

    if size is not None:
        import cv2

        mask = cv2.resize(mask.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)
    code = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode()}


def palette(classes: int) -> list[tuple[int, int, int]]:
    """A bright RGB colour for each class; neighbours in number are far apart in hue."""
    import cv2

    hues = (np.arange(classes) * 0.61803 % 1 * 180).astype(np.uint8)
    values = np.where(np.arange(classes) % 2, 255, 215).astype(np.uint8)
    colours = np.stack([hues, np.full_like(hues, 210), values], axis=-1)[None]
    rgb = cv2.cvtColor(colours, cv2.COLOR_HSV2RGB)[0]
    return [(int(r), int(g), int(b)) for r, g, b in rgb]
