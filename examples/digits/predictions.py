"""Draws what the trained models predict in held-out images, beside the truth."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from pycocotools import mask as coco_mask

from elsa_tools.predict import Detections, Segmentation, load_inferencer
from elsa_tools.predict.inputs import read_image
from elsa_tools.predict.results import Result, enlarge

from .trainings import Training

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

IMAGES = 6
MIN_SCORE = 0.5


def draw_predictions(training: Training, folder: Path, data: Path, path: Path) -> int:
    """Draws truth and predictions to ``path``; returns the model's number of parameters."""
    checkpoint = training.checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} has no checkpoint")
    files = sorted((data / "images" / "validation").glob("*.jpg"))
    files = files[:: max(1, len(files) // IMAGES)][:IMAGES]
    images = [read_image(str(file)) for file in files]
    inferencer = load_inferencer(str(training.config_path), str(checkpoint), device="cpu")
    results: list[Any] = [inferencer.predict(image) for image in images]
    truths: Sequence[Result] = [_true_labels(data, file) for file in files]
    if inferencer.task == "detection":
        results = [found.above(MIN_SCORE) for found in results]
        truths = true_detections(data, files)

    def drawn(found: Sequence[Result]) -> list[np.ndarray]:
        pairs = zip(images, found, strict=True)
        return [inferencer.draw(*enlarge(image, result)) for image, result in pairs]

    title = f"{training.framework}, {training.task}"
    rows = {"images": images, "truth": drawn(truths), title: drawn(results)}
    figure, axes = plt.subplots(
        len(rows), len(files), figsize=(3.4 * len(files), 11), squeeze=False, layout="constrained"
    )
    for row, (caption, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_title(caption, loc="left", fontsize=16)
        for panel, picture in zip(row, pictures, strict=True):
            panel.imshow(picture[..., ::-1])
            panel.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return sum(parameter.numel() for parameter in inferencer.model.parameters())


def true_detections(data: Path, files: Sequence[Path]) -> list[Detections]:
    """The annotated objects of validation images, with a score of 1."""
    content = json.loads((data / "annotations" / "instances_validation.json").read_text())
    ids = {Path(image["file_name"]).name: image["id"] for image in content["images"]}
    found = []
    for file in files:
        objects = [one for one in content["annotations"] if one["image_id"] == ids[file.name]]
        corners = np.array([one["bbox"] for one in objects], np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        found.append(
            Detections(
                np.array([one["category_id"] - 1 for one in objects]),
                np.ones(len(objects), np.float32),
                corners,
                np.stack([coco_mask.decode(one["segmentation"]) for one in objects]).astype(bool),
            )
        )
    return found


def _true_labels(data: Path, file: Path) -> Segmentation:
    path = data / "annotations" / "validation" / f"{file.stem}.png"
    # 1 is the background, class 0.
    labels: Any = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return Segmentation(labels.astype(np.int64) - 1)
