"""Predictions of exported models, without the frameworks that they come from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from elsa_core.runtime.errors import UsageError
from elsa_tools.export.record import Record, Resize

from .drawing import Painter
from .executors import Executor, load_executor
from .inferencer import Inferencer
from .paste import paste_masks
from .results import Detections, Result, Segmentation


class RuntimeInferencer(Inferencer):
    """An exported model with the test pipeline that its record describes.

    Args:
        model: an .onnx, .pt2 or .xml file that ``elsa export`` has written, or its executor.
        device, threads: of a file, see `elsa_tools.predict.executors.load_executor`.

    Raises UsageError for a file that cannot be run, or that predicts features.
    """

    def __init__(
        self, model: str | Executor, device: str | None = None, threads: int | None = None
    ) -> None:
        self.model = model if isinstance(model, Executor) else load_executor(model, device, threads)
        path = self.model.path
        record = self.record = self.model.record
        if record.task == "features":
            raise UsageError(f"the model must be a detector or a segmentor, {path} is a backbone")
        if not record.classes:
            raise UsageError(f"the record of {path} must name the model's classes, it names none")
        self.framework, self.task = record.framework, record.task
        self.classes, self.colours = list(record.classes), list(record.colours)

    def predict(self, image: np.ndarray) -> Result:
        (result,) = self.predict_batch([image])
        return result

    def predict_batch(self, images: Sequence[np.ndarray]) -> list[Result]:
        """Everything found in images [H, W, 3], 8 bits, blue first, in one run of the model.

        Those for a segmentor must have one size when they are resized.
        """
        inputs = [prepare(self.record, image) for image in images]
        sizes = np.array([one.shape[1:] for one in inputs], dtype=np.int64)
        if self.task == "segmentation" and len(np.unique(sizes, axis=0)) > 1:
            raise UsageError(f"a segmentor's images must have one size, got {sizes.tolist()}")
        batch = np.zeros((len(inputs), 3, *sizes.max(axis=0)), np.float32)
        for target, one in zip(batch, inputs, strict=True):
            target[:, : one.shape[1], : one.shape[2]] = one
        start = time.perf_counter()
        found = self.model.run(batch, sizes)
        self.model_seconds = time.perf_counter() - start
        shapes = [image.shape[:2] for image in images]
        if self.task == "segmentation":
            return [
                Segmentation(label_map(logits, shape))
                for logits, shape in zip(found["logits"], shapes, strict=True)
            ]
        return [
            self._detections(found, found["images"] == index, tuple(size), shape)
            for index, (size, shape) in enumerate(zip(sizes.tolist(), shapes, strict=True))
        ]

    def _detections(
        self,
        found: dict[str, np.ndarray],
        rows: np.ndarray,
        size: tuple[int, int],
        shape: tuple[int, int],
    ) -> Detections:
        """Those in ``rows``, of an image of ``shape`` that was resized to ``size``."""
        boxes, scores, labels = (found[name][rows] for name in ("boxes", "scores", "labels"))
        factors = [new / old for new, old in zip(shape, size, strict=True)]
        boxes = boxes * np.array(factors[::-1] * 2, dtype=np.float32)
        boxes = boxes.clip(0, np.array([*shape[::-1]] * 2, dtype=np.float32))
        keep = np.arange(len(boxes))
        if self.framework == "detectron2":  # leaves out boxes without area
            keep = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
        masks = None
        if self.record.masks:
            given = found["masks"][rows][keep]
            if self.record.masks == "logits":
                masks = paste_masks(given, boxes[keep], shape, self.record.mask_threshold)
            else:
                masks = resize_masks(given[:, : size[0], : size[1]], shape)
        return Detections(labels[keep], scores[keep], boxes[keep], masks)

    def draw(self, image: np.ndarray, result: Result) -> np.ndarray:
        return self.painter.draw(image, result)

    @cached_property
    def painter(self) -> Painter:
        return Painter(self.classes, self.colours)

    def normalisation(self) -> tuple[list[float], list[float]]:
        return list(self.record.mean), list(self.record.std)

    def resize(self) -> Resize | None:
        return self.record.resize

    def thresholds(self) -> tuple[float, float | None]:
        return (
            self.record.score_threshold,
            self.record.mask_threshold if self.record.masks else None,
        )


def prepare(record: Record, image: np.ndarray) -> np.ndarray:
    """An image [H, W, 3], 8 bits, blue first, as the model takes it: [3, h, w], float32, RGB."""
    pixels: np.ndarray = resize_image(record.resize, image)[..., ::-1].astype(np.float32)
    if record.normalised:
        pixels = (pixels - np.array(record.mean, np.float32)) / np.array(record.std, np.float32)
    return pixels.transpose(2, 0, 1)


def resize_image(resize: Resize | None, image: np.ndarray) -> np.ndarray:
    """An image [H, W, 3], 8 bits, as the test pipeline resizes it; None: as it is."""
    if resize is None:
        return image
    height, width = resize.size(*image.shape[:2])
    if resize.backend == "opencv":
        import cv2

        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def label_map(logits: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Logits [K, h, w] -> the best class of each pixel of an image of ``shape``, as PyTorch's
    bilinear interpolation between them says: so do both frameworks."""
    if logits.shape[1:] == shape:
        return logits.argmax(axis=0)
    import torch

    resized = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None], shape, mode="bilinear", align_corners=False
    )
    labels: np.ndarray = resized[0].argmax(dim=0).numpy()
    return labels


def resize_masks(masks: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Masks [N, h, w] of bool or uint8 for an image of ``shape``, bool."""
    if masks.shape[1:] == shape:
        return masks.astype(bool)
    import cv2

    kind = cv2.INTER_AREA if shape[0] < masks.shape[1] else cv2.INTER_LINEAR
    resized = np.zeros((len(masks), *shape), dtype=bool)
    for target, mask in zip(resized, masks, strict=True):
        target[:] = cv2.resize(mask.astype(np.float32), shape[::-1], interpolation=kind) >= 0.5
    return resized
