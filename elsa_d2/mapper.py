"""From a data set's entries to what a detector is trained and tested on."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pycocotools.mask
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.data.detection_utils import (
    SizeMismatchError,
    build_augmentation,
    check_image_size,
    transform_proposals,
)
from detectron2.data.transforms import TransformList
from detectron2.engine import DefaultPredictor

from elsa_core.errors import DamagedFileError, UsageError, one_line

from .augmentation import configure
from .checkpoint import AtomicCheckpointer
from .reading import read_image, read_map, to_tensor

logger = logging.getLogger(__name__)


class DetectionMapper(DatasetMapper):
    """DatasetMapper with the resize and the crop of INPUT, and with OpenMMLab's masks.

    With INPUT.MASK_FORMAT "bitmask", polygons are drawn at the image's own size and then resized,
    cropped and flipped with it.

    Raises DamagedFileError, which names the file, for an image that cannot be read or has another
    size than its annotations say, and for masks that cannot be used.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        options = super().from_config(cfg, is_train)
        augmentations = configure(cfg, options["augmentations"], is_train)
        return {**options, "augmentations": augmentations}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """As DatasetMapper's, which reads images by another rule."""
        entry = copy.deepcopy(dataset_dict)
        image = read_image(entry["file_name"], self.image_format)
        try:
            check_image_size(entry, image)
        except SizeMismatchError as error:  # which names the file
            raise DamagedFileError(one_line(error)) from error
        labels = entry.pop("sem_seg_file_name", None)
        data = T.AugInput(image, sem_seg=None if labels is None else read_map(labels))
        transforms = self.augmentations(data)
        entry["image"] = to_tensor(data.image)
        if data.sem_seg is not None:
            entry["sem_seg"] = torch.as_tensor(data.sem_seg.astype("long"))
        shape = data.image.shape[:2]
        if self.proposal_topk is not None:
            transform_proposals(entry, shape, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            entry.pop("annotations", None)
        elif "annotations" in entry:
            self._transform_annotations(entry, transforms, shape)
        return entry

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: TransformList, image_shape: tuple[int, int]
    ) -> None:
        name = dataset_dict["file_name"]
        try:
            self._transform(dataset_dict, transforms, image_shape)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(
                f"the annotations of image {name} cannot be used: {one_line(error)}"
            ) from error

    def _transform(
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
    """DefaultPredictor with the resize of INPUT.RESIZE, for weights of every framework."""

    def __init__(self, cfg: CfgNode) -> None:
        weights = cfg.MODEL.WEIGHTS
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = ""
        super().__init__(cfg)
        if weights:
            AtomicCheckpointer(self.model).load(weights)
        self.cfg.MODEL.WEIGHTS = weights
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
