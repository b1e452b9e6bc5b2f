"""Detectron2's COCO evaluation for every file that the checker accepts."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import logging
import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator as Detectron2Evaluator
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from elsa_core.data.coco import load_coco
from elsa_core.data.coco_eval import LEAST_LIMIT, evaluate_detections, limit_warning, unseen_warning
from elsa_core.runtime.errors import UsageError
from elsa_d2.data.keypoints import fill_keypoints

from .files import PREFIX


class COCOEvaluator(Detectron2Evaluator):
    """COCOEvaluator whose AP, AP50, AP75, APs, APm and APl are correct for every valid file.

    All six count up to ``limit`` detections of an image, at least 100. The ground truth is
    that of `elsa_core.data.coco.normalised`. A model that detects nothing has AP 0. Detectron2's
    own code evaluates keypoints and proposals; an object without ``keypoints`` has none that count.

    Args:
        dataset_name: a data set whose metadata name a COCO file, ``json_file``; another data set is
            converted to one in `output_dir`.
        tasks: any of "bbox", "segm" and "keypoints".
        limit: maximum number of detections of the model in an image.
        output_dir: folder of instances_predictions.pth and coco_instances_results.json; None: none.
        distributed: whether to gather the predictions of all processes.
        kpt_oks_sigmas: sigmas of the keypoints; empty: COCO's.

    Raises:
        UsageError: for a file in which the checker finds errors.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str],
        limit: int = LEAST_LIMIT,
        output_dir: str | None = None,
        *,
        distributed: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
    ) -> None:
        # Not super's: it reads the file as pycocotools does, which knows no byte order mark.
        self._logger = logging.getLogger(__name__)
        self._metadata = MetadataCatalog.get(dataset_name)
        self._tasks, self._limit = tuple(tasks), limit
        self._output_dir = PREFIX + output_dir if output_dir else None
        self._max_dets_per_image = [1, 10, max(LEAST_LIMIT, limit)]
        self._distributed, self._kpt_oks_sigmas = distributed, kpt_oks_sigmas
        self._cpu_device, self._use_fast_impl = torch.device("cpu"), False
        if not hasattr(self._metadata, "json_file"):
            if output_dir is None:
                raise UsageError(
                    f"output_dir must name a folder: {dataset_name!r} has no COCO file"
                )
            path = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
            convert_to_coco_json(dataset_name, path, allow_cached=False)
            self._metadata.json_file = path
        file = self._metadata.json_file
        try:
            local = PathManager.get_local_path(file)
            self._coco = load_coco(local, masks="segm" in tasks, name=file)
        except UsageError as error:
            raise UsageError(f"annotation file of data set {dataset_name!r}: {error}") from error
        if "keypoints" in tasks and (names := self._metadata.get("keypoint_names")):
            fill_keypoints(self._coco.get("annotations") or [], 3 * len(names))
        self._coco_api = COCO()
        self._coco_api.dataset = self._coco
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api.createIndex()
        self._do_evaluation = "annotations" in self._coco
        if warning := limit_warning(self._coco, limit, "TEST.DETECTIONS_PER_IMAGE"):
            self._logger.warning(f"data set {dataset_name!r}: {warning}")

    @property
    def _labels(self) -> dict[Any, int]:
        """Returns the label of each category id, known once the data set has been loaded."""
        ids = {one["id"]: one["id"] for one in self._coco["categories"]}
        return self._metadata.get("thing_dataset_id_to_contiguous_id", ids)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """As Detectron2's, but computes widths and heights in float64, as MMDetection does."""
        start = len(self._predictions)
        super().process(inputs, outputs)
        instances = [output["instances"] for output in outputs if "instances" in output]
        for prediction, found in zip(self._predictions[start:], instances, strict=False):
            boxes = found.pred_boxes.tensor.double().tolist()
            for one, (left, top, right, bottom) in zip(prediction["instances"], boxes, strict=True):
                one["bbox"] = [left, top, right - left, bottom - top]

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Collection[Any] | None = None
    ) -> None:
        detections = list(itertools.chain(*(one["instances"] for one in predictions)))
        if "keypoints" in self._tasks and detections:
            self._eval_keypoints(predictions, img_ids)
        elif "keypoints" in self._tasks and self._do_evaluation:
            self._results["keypoints"] = dict.fromkeys(("AP", "AP50", "AP75", "APm", "APl"), 0.0)
        self._save(detections)
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return
        if img_ids is None:
            warning = unseen_warning(self._coco, {one["image_id"] for one in predictions})
            if warning:
                self._logger.warning(warning)
        for task in self._tasks:
            if task == "keypoints":
                continue
            limit = self._max_dets_per_image[-1]
            evaluation = evaluate_detections(
                self._coco, self._labels, detections, task, limit, image_ids=img_ids
            )
            self._logger.info(f"Evaluation of {task} at {limit} detections:\n{evaluation}")
            self._results[task] = self._derive_coco_results(
                evaluation, task, class_names=self._metadata.get("thing_classes")
            )

    def _eval_keypoints(
        self, predictions: list[dict[str, Any]], img_ids: Collection[Any] | None
    ) -> None:
        """As Detectron2, with up to 20 detections of an image, COCO's own limit for keypoints."""
        tasks, self._tasks = self._tasks, ("keypoints",)
        limits, self._max_dets_per_image = self._max_dets_per_image, [1, 10, LEAST_LIMIT]
        try:
            super()._eval_predictions(copy.deepcopy(predictions), img_ids)
        finally:
            self._tasks, self._max_dets_per_image = tasks, limits

    def _save(self, detections: list[dict[str, Any]]) -> None:
        """Writes COCO's results, with the category ids of the data set."""
        ids = {label: category for category, label in self._labels.items()}
        if wrong := [one["category_id"] for one in detections if one["category_id"] not in ids]:
            raise UsageError(
                f"labels must be 0..{len(ids) - 1} for the {len(ids)} classes of the data set, "
                f"got {wrong[0]}"
            )
        if not self._output_dir:
            return
        path = os.path.join(self._output_dir, "coco_instances_results.json")
        self._logger.info(f"Saving results to {path.removeprefix(PREFIX)}")
        with PathManager.open(path, "w") as file:
            json.dump([{**one, "category_id": ids[one["category_id"]]} for one in detections], file)
