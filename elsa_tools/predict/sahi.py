"""Our detectors in SAHI, which finds small objects in large images slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sahi.models.base import DetectionModel
from sahi.prediction import ObjectPrediction
from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list
from sahi.utils.cv import get_coco_segmentation_from_bool_mask

from elsa_core.runtime.errors import UsageError

from .inferencer import Inferencer
from .load import load_inferencer


class ElsaDetectionModel(DetectionModel):
    """A detector of Detectron2 or MMDetection for SAHI's functions.

    It predicts in each slice what `load_inferencer` predicts in an image, and takes the same files.
    As in SAHI's own models, the box of an object with a mask becomes the mask's box, and a mask of
    too few pixels for a polygon is left out.

    Args:
        config, weights: see `elsa_tools.predict.load_inferencer`.
        options: config settings, see there; among them the size to which slices are resized.
        arguments: SAHI's own, such as ``device``, ``confidence_threshold`` or ``load_at_init``.

    Raises:
        UsageError: files or options that cannot be used, a model that is no detector, or SAHI's
            ``image_size``, for which there are options.
    """

    def __init__(
        self, config: str, weights: str | None, *, options: Sequence[str] = (), **arguments: Any
    ) -> None:
        if arguments.get("image_size") is not None:
            raise UsageError(
                "image_size must be set in the config, by options such as INPUT.MIN_SIZE_TEST 800, "
                f"got image_size={arguments['image_size']}"
            )
        self.options = options
        super().__init__(model_path=weights, config_path=config, **arguments)

    def load_model(self) -> None:
        assert self.config_path is not None
        self.set_model(
            load_inferencer(
                self.config_path, self.model_path, device=str(self.device), options=self.options
            )
        )

    def set_model(self, model: Inferencer, **_: Any) -> None:
        if model.task != "detection":
            raise UsageError(f"SAHI needs a detector, got a model for {model.task}")
        self.model = model
        if not self.category_mapping:
            self.category_mapping = {str(i): name for i, name in enumerate(model.classes)}

    @property
    def category_names(self) -> list[str]:
        return list(self.category_mapping.values())

    @property
    def num_categories(self) -> int:
        return len(self.category_mapping)

    def perform_inference(self, image: np.ndarray) -> None:
        """Predicts in an image [H, W, 3], 8 bits, RGB."""
        found: Any = self.model.predict(np.ascontiguousarray(image[..., ::-1]))
        self._original_predictions = found.above(self.confidence_threshold)

    def _create_object_prediction_list_from_original_predictions(
        self, shift_amount_list: Any = None, full_shape_list: Any = None
    ) -> None:
        shift = fix_shift_amount_list(shift_amount_list or [[0, 0]])[0]
        shapes = fix_full_shape_list(full_shape_list)
        found = self._original_predictions
        predictions = []
        for index, (box, label) in enumerate(
            zip(found.boxes.tolist(), found.labels.tolist(), strict=True)
        ):
            if not (max(box[0], 0) < box[2] and max(box[1], 0) < box[3]):
                continue  # without area in the image
            polygons = None
            if found.masks is not None:
                polygons = get_coco_segmentation_from_bool_mask(found.masks[index]) or None
            predictions.append(
                ObjectPrediction(
                    bbox=box,
                    category_id=label,
                    category_name=self.category_mapping[str(label)],
                    segmentation=polygons,
                    score=float(found.scores[index]),
                    shift_amount=shift,
                    full_shape=shapes[0] if shapes else None,
                )
            )
        self._object_prediction_list_per_image = [predictions]
