"""Predictions of Detectron2 models."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import Instances as D2Instances
from detectron2.utils.visualizer import ColorMode, Visualizer

import elsa_d2
import elsa_weights
from elsa_core.errors import UsageError, one_line
from elsa_d2 import preflight
from elsa_d2.semantic_config import is_semantic

from .metadata import class_names
from .models import Predictor
from .results import Instances, Result, Segmentation


class Detectron2Predictor(Predictor):
    """See `elsa_infer.load_predictor`."""

    framework = "detectron2"

    def __init__(
        self, config: str, weights: str | None, device: str, options: Sequence[str]
    ) -> None:
        cfg = elsa_d2.load_config(config, options)
        cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", device
        self.cfg = cfg
        self.task = "segmentation" if is_semantic(cfg) else "detection"
        elsa_d2.register_coco_datasets(cfg)
        elsa_d2.register_sem_seg_datasets(cfg)
        try:
            self.predictor = elsa_d2.Predictor(cfg)
        except (KeyError, ValueError) as error:
            raise UsageError(f"the config {config} cannot be used: {one_line(error)}") from error
        self.model = self.predictor.model
        if weights is not None:
            preflight._check_fit(weights, self.model)
            elsa_d2.AtomicCheckpointer(self.model).load(weights, checkpointables=[])
        metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else Metadata()
        if self.task == "segmentation":
            number = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
            names = metadata.get("stuff_classes") or _names_in(weights)
            self.name_classes(number, names, metadata.get("stuff_colors"))
        else:
            number = cfg.MODEL.ROI_HEADS.NUM_CLASSES
            names = metadata.get("thing_classes") or _categories(metadata) or _names_in(weights)
            self.name_classes(number, names, metadata.get("thing_colors"))

    def predict(self, image: np.ndarray) -> Result:
        found = self.predictor(image)
        if self.task == "segmentation":
            return Segmentation(found["sem_seg"].argmax(0).cpu().numpy())
        instances = found["instances"].to("cpu")
        masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
        return Instances(
            instances.pred_classes.numpy(),
            instances.scores.numpy(),
            instances.pred_boxes.tensor.numpy(),
            masks,
        )

    def draw(self, image: np.ndarray, result: Result) -> np.ndarray:
        metadata = Metadata(
            thing_classes=self.classes,
            thing_colors=self.colours,
            stuff_classes=self.classes,
            stuff_colors=self.colours,
        )
        painter = Visualizer(image[..., ::-1], metadata, instance_mode=ColorMode.SEGMENTATION)
        if isinstance(result, Segmentation):
            painted = painter.draw_sem_seg(self.painted_labels(result), alpha=0.5)
        else:
            found = D2Instances(image.shape[:2])
            found.pred_boxes, found.scores = result.boxes, result.scores
            found.pred_classes = torch.from_numpy(result.labels)
            if result.masks is not None:
                found.pred_masks = result.masks
            painted = painter.draw_instance_predictions(found)
        return np.ascontiguousarray(painted.get_image()[..., ::-1])

    def normalisation(self) -> tuple[list[float], list[float]]:
        if self.cfg.INPUT.FORMAT != "RGB":
            raise UsageError(f"INPUT.FORMAT must be RGB, got {self.cfg.INPUT.FORMAT}")
        return list(self.cfg.MODEL.PIXEL_MEAN), list(self.cfg.MODEL.PIXEL_STD)


def _categories(metadata: Metadata) -> list[str] | None:
    """Class names in a COCO file, in the order of their ids; None without a readable file."""
    path = metadata.get("json_file")
    if not path or not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            categories = json.load(file)["categories"]
        return [one["name"] for one in sorted(categories, key=lambda one: one["id"])]
    except (KeyError, TypeError, ValueError):
        return None


def _names_in(weights: str | None) -> Any:
    """Class names that a checkpoint of OpenMMLab carries."""
    if weights is None:
        return None
    content = elsa_weights.read_checkpoint(weights)
    return class_names(content)[0]
