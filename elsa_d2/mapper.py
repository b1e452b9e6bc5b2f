"""From a data set's entries to what a detector is trained and tested on."""

from __future__ import annotations

import logging
from typing import Any

import pycocotools.mask
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import TransformList
from detectron2.engine import DefaultPredictor

from elsa_core.errors import UsageError

from .augmentation import configure

logger = logging.getLogger(__name__)


class DetectionMapper(DatasetMapper):
    """DatasetMapper with the resize and the crop of INPUT, and with OpenMMLab's masks.

    With INPUT.MASK_FORMAT "bitmask", polygons are drawn at the image's own size and then resized,
    cropped and flipped with it.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        options = super().from_config(cfg, is_train)
        augmentations = configure(cfg, options["augmentations"], is_train)
        return {**options, "augmentations": augmentations}

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: TransformList, image_shape: tuple[int, int]
    ) -> None:
        if self.use_instance_mask and self.instance_mask_format == "bitmask":
            size = dataset_dict["height"], dataset_dict["width"]
            for annotation in dataset_dict["annotations"]:
                polygons = annotation.get("segmentation")
                if isinstance(polygons, list):
                    parts = pycocotools.mask.frPyObjects(polygons, *size)
                    annotation["segmentation"] = pycocotools.mask.merge(parts)
        super()._transform_annotations(dataset_dict, transforms, image_shape)


class Predictor(DefaultPredictor):
    """DefaultPredictor with the resize of INPUT.RESIZE."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        (self.aug,) = configure(cfg, build_augmentation(cfg, False), False)


def training_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """Entries of DATASETS.TRAIN: images with objects, unless DATALOADER.FILTER_EMPTY_ANNOTATIONS
    says otherwise, whose edges have DATALOADER.MIN_IMAGE_SIZE pixels or more.

    Raises UsageError if there are none.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    entries = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    least = cfg.DATALOADER.MIN_IMAGE_SIZE
    kept = [entry for entry in entries if min(entry["height"], entry["width"]) >= least]
    if len(kept) < len(entries):
        logger.info(f"Left out {len(entries) - len(kept)} images with an edge under {least} pixels")
    if not kept:
        raise UsageError(
            f"no training image has both edges of at least DATALOADER.MIN_IMAGE_SIZE {least} pixels"
        )
    return kept
