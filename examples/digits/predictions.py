"""Pictures of what the trained models see in held-out images, beside the truth."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools.coco import COCO
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .dataset import CLASSES, PALETTE, SEGMENTATION_PALETTE
from .trainings import Training

IMAGES = 6
ENLARGE = 2
MIN_SCORE = 0.5
CAPTION_HEIGHT = 34


@dataclass(frozen=True)
class Instances:
    """Objects of an image: labels [N], masks [N, H, W], boxes [N, 4] (x1 y1 x2 y2), scores [N]."""

    labels: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray | None = None


def draw_predictions(training: Training, folder: Path, data: Path, path: Path) -> int:
    """Draws truth and predictions to `path`; returns the model's number of parameters."""
    checkpoint = training.checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} has no checkpoint")
    names = _spread(sorted((data / "images" / "validation").glob("*.jpg")), IMAGES)
    images = [cv2.imread(str(name)) for name in names]
    model, predict = _LOADERS[training.name](training, checkpoint)
    with torch.inference_mode():
        predicted = [predict(image) for image in images]
    if isinstance(predicted[0], Instances):
        truth = _instance_truth(data, names)
        draw: Callable[[np.ndarray, Any], np.ndarray] = _draw_instances
    else:
        truth = [_segmentation_truth(data, name) for name in names]
        draw = _draw_segmentation
    rows = [
        ("images", images),
        ("truth", [draw(image, what) for image, what in zip(images, truth, strict=True)]),
        (
            f"{training.framework}, {training.task}",
            [draw(image, what) for image, what in zip(images, predicted, strict=True)],
        ),
    ]
    _write_grid(rows, path)
    return sum(parameter.numel() for parameter in model.parameters())


def _spread(items: Sequence[Path], count: int) -> list[Path]:
    step = max(1, len(items) // count)
    return list(items[::step][:count])


def _load_detectron2(training: Any, checkpoint: Path) -> tuple[torch.nn.Module, Callable[..., Any]]:
    from detectron2.engine import DefaultPredictor

    cfg = training.load_config()
    cfg.MODEL.WEIGHTS = str(checkpoint)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    predictor = DefaultPredictor(cfg)

    def predict(image: np.ndarray) -> Instances:
        found = predictor(image)["instances"].to("cpu")
        found = found[found.scores >= MIN_SCORE]
        return Instances(
            found.pred_classes.numpy(),
            found.pred_masks.numpy(),
            found.pred_boxes.tensor.numpy(),
            found.scores.numpy(),
        )

    return predictor.model, predict


def _load_mmdetection(
    training: Any, checkpoint: Path
) -> tuple[torch.nn.Module, Callable[..., Any]]:
    from mmdet.apis import inference_detector, init_detector

    model = init_detector(
        str(training.config_path), str(checkpoint), palette="random", device="cpu"
    )

    def predict(image: np.ndarray) -> Instances:
        found = inference_detector(model, image).pred_instances.cpu()
        found = found[found.scores >= MIN_SCORE]
        return Instances(
            found.labels.numpy(),
            np.asarray(found.masks),
            found.bboxes.numpy(),
            found.scores.numpy(),
        )

    return model, predict


def _load_mmsegmentation(
    training: Any, checkpoint: Path
) -> tuple[torch.nn.Module, Callable[..., Any]]:
    from mmseg.apis import inference_model, init_model

    model = init_model(str(training.config_path), str(checkpoint), device="cpu")

    def predict(image: np.ndarray) -> np.ndarray:
        labels: np.ndarray = inference_model(model, image).pred_sem_seg.data[0].cpu().numpy()
        return labels

    return model, predict


_LOADERS = {
    "detectron2": _load_detectron2,
    "mmdetection": _load_mmdetection,
    "mmsegmentation": _load_mmsegmentation,
}


def _instance_truth(data: Path, names: Sequence[Path]) -> list[Instances]:
    annotations = json.loads((data / "annotations" / "instances_validation.json").read_text())
    coco = COCO()
    coco.dataset = annotations
    coco.createIndex()
    ids = {Path(image["file_name"]).name: image["id"] for image in annotations["images"]}
    order = {category: index for index, category in enumerate(sorted(coco.getCatIds()))}
    truth = []
    for name in names:
        objects = coco.loadAnns(coco.getAnnIds(ids[name.name]))
        boxes = np.array([item["bbox"] for item in objects], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        truth.append(
            Instances(
                np.array([order[item["category_id"]] for item in objects]),
                np.array([coco.annToMask(item) for item in objects], dtype=bool),
                boxes,
            )
        )
    return truth


def _segmentation_truth(data: Path, name: Path) -> np.ndarray:
    mask = cv2.imread(
        str(data / "annotations" / "validation" / f"{name.stem}.png"), cv2.IMREAD_UNCHANGED
    )
    return mask.astype(np.int64) - 1  # 1 is the background, class 0


def _enlarge(image: np.ndarray) -> torch.Tensor:
    """BGR [H, W, 3] to an enlarged RGB tensor [3, H', W']."""
    large = cv2.resize(image, None, fx=ENLARGE, fy=ENLARGE, interpolation=cv2.INTER_CUBIC)
    return torch.from_numpy(np.ascontiguousarray(large[..., ::-1])).permute(2, 0, 1)


def _enlarge_masks(masks: np.ndarray) -> torch.Tensor:
    repeated = masks.repeat(ENLARGE, axis=-2).repeat(ENLARGE, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(repeated)).bool()


def _to_bgr(image: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1])


def _draw_instances(image: np.ndarray, what: Instances) -> np.ndarray:
    canvas = _enlarge(image)
    colors = [PALETTE[label] for label in what.labels]
    if len(colors) == 0:
        return _to_bgr(canvas)
    canvas = draw_segmentation_masks(canvas, _enlarge_masks(what.masks), alpha=0.5, colors=colors)
    boxes = torch.from_numpy(what.boxes) * ENLARGE
    result = _to_bgr(draw_bounding_boxes(canvas, boxes, colors=colors, width=2))
    for index, label in enumerate(what.labels):
        text = CLASSES[label]
        if what.scores is not None:
            text += f" {what.scores[index]:.2f}"
        _write(result, text, boxes[index, :2].tolist(), PALETTE[label])
    return result


def _write(image: np.ndarray, text: str, corner: Sequence[float], color: Sequence[int]) -> None:
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.5
    (width, height), _ = cv2.getTextSize(text, font, scale, 1)
    x = int(min(max(0, corner[0]), image.shape[1] - width - 4))
    y = int(max(height + 5, corner[1]))
    bgr = tuple(int(value) for value in reversed(color))
    cv2.rectangle(image, (x, y - height - 5), (x + width + 4, y), bgr, cv2.FILLED)
    ink = (0, 0, 0) if sum(color) > 350 else (255, 255, 255)
    cv2.putText(image, text, (x + 2, y - 3), font, scale, ink, 1, cv2.LINE_AA)


def _draw_segmentation(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    classes = [index for index in np.unique(labels) if 0 < index < len(SEGMENTATION_PALETTE)]
    canvas = _enlarge(image)
    if not classes:
        return _to_bgr(canvas)
    masks = _enlarge_masks(np.stack([labels == index for index in classes]))
    colors = [SEGMENTATION_PALETTE[index] for index in classes]
    result = _to_bgr(draw_segmentation_masks(canvas, masks, alpha=0.65, colors=colors))
    for index, mask in zip(classes, masks, strict=True):
        rows, columns = np.nonzero(mask.numpy())
        _write(result, CLASSES[index - 1], (columns.min(), rows.min()), SEGMENTATION_PALETTE[index])
    return result


def _write_grid(rows: Sequence[tuple[str, Sequence[np.ndarray]]], path: Path) -> None:
    """A strip of images a row, each row under its caption."""
    gap, parts = 6, []
    for caption, images in rows:
        cells = [_to_bgr(_enlarge(image)) if caption == "images" else image for image in images]
        strip = np.concatenate([np.pad(cell, ((0, gap), (0, gap), (0, 0))) for cell in cells], 1)
        header = np.full((CAPTION_HEIGHT, strip.shape[1], 3), 255, np.uint8)
        baseline = (4, CAPTION_HEIGHT - 10)
        cv2.putText(header, caption, baseline, cv2.FONT_HERSHEY_SIMPLEX, 0.75, (0, 0, 0), 2)
        strip[-gap:], strip[:, -gap:] = 255, 255
        parts += [header, strip]
    if not cv2.imwrite(str(path), np.concatenate(parts)):
        raise OSError(f"{path} cannot be written")
