"""Predictions of Detectron2 models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import Instances as D2Instances
from detectron2.utils.visualizer import ColorMode, Visualizer

import elsa_d2
from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.weights import forget_ahead
from elsa_d2.checkpoint import check_checkpoint
from elsa_d2.config import is_sem_seg
from elsa_d2.data.classes import class_kind, class_names, number_of_classes
from elsa_d2.data.safe_loading import channels_of
from elsa_tools.export.record import Resize

from .inferencer import Inferencer
from .results import Detections, Result, Segmentation
from .timing import forward_times


class Detectron2Inferencer(Inferencer):
    """See `elsa_tools.predict.load_inferencer`."""

    framework = "detectron2"

    def __init__(
        self, config: str, weights: str | None, device: str, options: Sequence[str]
    ) -> None:
        cfg = elsa_d2.load_config(config, options)
        cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", device
        names = None
        self.cfg, self.channels = cfg, channels_of(cfg.INPUT.FORMAT)
        self.task = "segmentation" if is_sem_seg(cfg) else "detection"
        for register in (
            elsa_d2.register_coco_datasets,
            elsa_d2.register_sem_seg_datasets,
            elsa_d2.register_cityscapes_datasets,
        ):
            register(cfg)
        try:
            self.predictor = elsa_d2.Predictor(cfg)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"the config {config} cannot be used: {one_line(error)}") from error
        self.model = self.predictor.model
        if weights is not None:
            names = check_checkpoint(weights, self.model)  # the model has its weights now
            forget_ahead()
        data = [*cfg.DATASETS.TRAIN[:1], *cfg.DATASETS.TEST]
        listed = (class_names(name, class_kind(cfg)) for name in data)
        configured = next(filter(None, listed), None)
        metadata = MetadataCatalog.get(data[0]) if data else Metadata()
        colours = metadata.get(class_kind(cfg).replace("classes", "colors"))
        self.name_classes(number_of_classes(cfg), names, configured, colours)

    def predict(self, image: np.ndarray) -> Result:
        with forward_times(self.model) as seconds:
            found = self.predictor(image)
        self.model_seconds = sum(seconds)
        if self.task == "segmentation":
            return Segmentation(found["sem_seg"].argmax(0).cpu().numpy())
        instances = found["instances"].to("cpu")
        masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
        return Detections(
            instances.pred_classes.numpy(),
            instances.scores.numpy(),
            instances.pred_boxes.tensor.numpy(),
            masks,
        )

    def draw(self, image: np.ndarray, result: Result) -> np.ndarray:
        metadata = Metadata(
            thing_classes=self.names_for_matplotlib,
            thing_colors=self.colours,
            stuff_classes=self.names_for_matplotlib,
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

    def resize(self) -> Resize | None:
        node = self.cfg.INPUT
        if node.MIN_SIZE_TEST == 0:
            return None
        backend = {"cv2": "opencv", "pil": "pillow"}[node.RESIZE_BACKEND]
        return Resize(int(node.MIN_SIZE_TEST), int(node.MAX_SIZE_TEST), backend)

    def thresholds(self) -> tuple[float, float | None]:
        score = float(self.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST)
        return score, 0.5 if self.cfg.MODEL.MASK_ON else None
