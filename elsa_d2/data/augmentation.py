"""Resizing and cropping of the published recipe, configured by keys of INPUT."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from PIL import Image

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.packages import need

_METHODS = {
    Image.NEAREST: "INTER_NEAREST",
    Image.BILINEAR: "INTER_LINEAR",
    Image.BICUBIC: "INTER_CUBIC",
}


def need_opencv(purpose: str) -> ModuleType:
    """Returns the module cv2, which Detectron2 does not install; raises UsageError without it."""
    return need("cv2", purpose)


class OpenCVResizeTransform(T.ResizeTransform):
    """ResizeTransform by ``cv2.resize``, as in OpenMMLab, instead of by Pillow."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resizes an image [H, W] or [H, W, C]; ``interp`` is a constant of Pillow."""
        cv2 = need_opencv("a resize by OpenCV")
        method = getattr(cv2, _METHODS[self.interp if interp is None else interp])
        size = (self.new_w, self.new_h)
        # OpenCV takes no mirrored views, as RGB from BGR is, and drops a single channel's axis.
        resized = cv2.resize(np.ascontiguousarray(img), size, interpolation=method)
        return resized.reshape(self.new_h, self.new_w, *img.shape[2:])

    def inverse(self) -> OpenCVResizeTransform:
        return OpenCVResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)


class OpenCVResizeShortestEdge(T.ResizeShortestEdge):
    """ResizeShortestEdge by OpenCV, to sizes rounded as in OpenMMLab."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        edges = self.short_edge_length
        size = (
            np.random.randint(edges[0], edges[1] + 1) if self.is_range else np.random.choice(edges)
        )
        if size == 0:
            return T.NoOpTransform()
        h, w = image.shape[:2]
        scale = min(self.max_size / max(h, w), size / min(h, w))
        return OpenCVResizeTransform(h, w, int(h * scale + 0.5), int(w * scale + 0.5), self.interp)


RESIZES = {"pil": T.ResizeShortestEdge, "cv2": OpenCVResizeShortestEdge}


def resize_class(cfg: CfgNode) -> type[T.ResizeShortestEdge]:
    """Returns the resize of INPUT.RESIZE_BACKEND: "pil" is Detectron2's, "cv2" OpenMMLab's.

    Raises UsageError for another name, and for "cv2" without OpenCV.
    """
    backend = cfg.INPUT.RESIZE_BACKEND
    if backend not in RESIZES:
        raise UsageError(
            f"INPUT.RESIZE_BACKEND must be one of {', '.join(RESIZES)}, got {backend!r}"
        )
    if backend == "cv2":
        need_opencv("INPUT.RESIZE_BACKEND cv2")
    return RESIZES[backend]


def configure_augmentation(
    cfg: CfgNode, augmentations: Sequence[T.Augmentation], is_train: bool
) -> list[T.Augmentation]:
    """Returns Detectron2's augmentations with the resize of INPUT.RESIZE_BACKEND.

    INPUT.MULTI_SCALE_CROP adds a crop for training, after the flips. It is DETR's (arXiv
    2005.12872, section 4): with probability PROB, the image is resized to a short edge from
    MIN_SIZES and cropped to between CROP_SIZE[0] and CROP_SIZE[1] pixels.
    """
    resize = resize_class(cfg)
    chosen = [
        resize(item.short_edge_length, item.max_size, "range" if item.is_range else "choice")
        if isinstance(item, T.ResizeShortestEdge)
        else item
        for item in augmentations
    ]
    crop = cfg.INPUT.MULTI_SCALE_CROP
    if is_train and crop.ENABLED:
        steps = [
            resize(list(crop.MIN_SIZES), cfg.INPUT.MAX_SIZE_TRAIN, "choice"),
            T.RandomCrop("absolute_range", tuple(crop.CROP_SIZE)),
        ]
        flips = [item for item in chosen if isinstance(item, T.RandomFlip)]
        others = [item for item in chosen if not isinstance(item, T.RandomFlip)]
        # Flips come first, as in the original: masks resized by nearest pixels are not symmetric.
        chosen = [*flips, T.RandomApply(T.AugmentationList(steps), prob=crop.PROB), *others]
    return chosen
