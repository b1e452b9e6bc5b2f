"""MMSegmentation's training augmentations for Detectron2.

From the same state of NumPy's random numbers, each gives the result of MMSegmentation's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, Transform

from .augmentation import OpenCVResizeTransform, need_opencv

TRIES = 10


class ResizeToFit(T.Augmentation):
    """Resizes an image to the largest size that fits into a box, upright or turned.

    Args:
        scale: sides of the box in pixels, in any order.
        ratio_range: range of a uniform random factor of the box, whose sides are rounded down.
    """

    def __init__(self, scale: Sequence[int], ratio_range: Sequence[float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.scale, self.ratio_range = tuple(scale), tuple(ratio_range)

    def get_transform(self, image: np.ndarray) -> Transform:
        low, high = self.ratio_range
        ratio = np.random.random_sample() * (high - low) + low if low != high else low
        box = [int(side * ratio) for side in self.scale]
        h, w = image.shape[:2]
        factor = min(max(box) / max(h, w), min(box) / min(h, w))
        return OpenCVResizeTransform(h, w, *(max(1, int(side * factor + 0.5)) for side in (h, w)))


class RandomCropCategoryArea(T.Augmentation):
    """A random crop in which no class takes too large a part.

    A side of the image that is shorter than the crop is kept whole. After 10 tries, the next crop
    is taken as it is.

    Args:
        size: height and width in pixels.
        max_ratio: upper bound of the share of each class in the labelled pixels; 1: none.
        ignore_value: label of pixels without a class.
    """

    def __init__(
        self, size: Sequence[int], max_ratio: float = 1.0, ignore_value: int = 255
    ) -> None:
        super().__init__()
        self.size, self.max_ratio, self.ignore_value = tuple(size), max_ratio, ignore_value

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray) -> Transform:
        crop = self._draw(image)
        if self.max_ratio < 1:
            for _ in range(TRIES):
                if self._is_mixed(crop.apply_segmentation(sem_seg)):
                    break
                crop = self._draw(image)
        return crop

    def _draw(self, image: np.ndarray) -> CropTransform:
        spare = [max(have - want, 0) for have, want in zip(image.shape, self.size, strict=False)]
        y, x = (np.random.randint(0, pixels + 1) for pixels in spare)
        h, w = (min(have, want) for have, want in zip(image.shape, self.size, strict=False))
        return CropTransform(x, y, w, h, image.shape[1], image.shape[0])

    def _is_mixed(self, labels: np.ndarray) -> bool:
        counts = np.bincount(labels.ravel(), minlength=self.ignore_value + 1)
        counts[self.ignore_value] = 0
        return bool((counts > 0).sum() > 1 and counts.max() / counts.sum() < self.max_ratio)


class PhotometricDistortion(T.Augmentation):
    """Random brightness, contrast, saturation and hue, each with probability 0.5.

    Contrast comes second or last, with equal chance.

    Args:
        image_format: "RGB" or "BGR", of images [H, W, 3] in 0..255.
        brightness: largest change, in grey levels.
        contrast, saturation: range of the factor.
        hue: largest change, in steps of 2 degrees.
    """

    def __init__(
        self,
        image_format: str = "RGB",
        brightness: int = 32,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: int = 18,
    ) -> None:
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        heads, uniform = partial(np.random.randint, 2), np.random.uniform
        shift = uniform(-self.brightness, self.brightness) if heads() else 0
        contrast_first = bool(heads())
        contrast = 1.0
        if contrast_first and heads():
            contrast = uniform(*self.contrast)
        saturation = uniform(*self.saturation) if heads() else None
        hue = np.random.randint(-self.hue, self.hue) if heads() else None
        if not contrast_first and heads():
            contrast = uniform(*self.contrast)

        def distort(image: np.ndarray) -> np.ndarray:
            image = _linear(image, 1.0, shift)
            if contrast_first:
                image = _linear(image, contrast)
            if saturation is not None or hue is not None:
                image = self._in_hsv(image, saturation, hue)
            return image if contrast_first else _linear(image, contrast)

        return T.ColorTransform(distort)

    def _in_hsv(self, image: np.ndarray, saturation: float | None, hue: int | None) -> np.ndarray:
        """Each change converts to HSV and back by itself, with its own rounding."""
        cv2 = need_opencv("a change of colours")
        there = getattr(cv2, f"COLOR_{self.image_format}2HSV")
        back = getattr(cv2, f"COLOR_HSV2{self.image_format}")
        if saturation is not None:
            hsv = cv2.cvtColor(image, there)
            hsv[..., 1] = _linear(hsv[..., 1], saturation)
            image = cv2.cvtColor(hsv, back)
        if hue is not None:
            hsv = cv2.cvtColor(image, there)
            hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
            image = cv2.cvtColor(hsv, back)
        return image


def _linear(image: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Returns factor * image + shift, clamped to 0..255 and rounded down."""
    if factor == 1 and shift == 0:
        return image
    return np.clip(image.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Returns the augmentations of INPUT.SEM_SEG and INPUT.RANDOM_FLIP, in MMSegmentation's order.

    Raises UsageError without OpenCV.
    """
    need_opencv("MMSegmentation's resize")
    node = cfg.INPUT.SEM_SEG
    if not is_train:
        return [ResizeToFit(node.SCALE)]
    augmentations = [
        ResizeToFit(node.SCALE, node.RATIO_RANGE),
        RandomCropCategoryArea(
            node.CROP_SIZE, node.MAX_CATEGORY_RATIO, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        ),
    ]
    flip = cfg.INPUT.RANDOM_FLIP
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    if node.COLOR_AUG:
        augmentations.append(PhotometricDistortion(cfg.INPUT.FORMAT))
    return augmentations
