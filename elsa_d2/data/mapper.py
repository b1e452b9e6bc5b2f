"""Maps the records of a data set to the input of a detector."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import pycocotools.mask
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.data.detection_utils import (
    SizeMismatchError,
    annotations_to_instances,
    check_image_size,
    filter_empty_instances,
    transform_instance_annotations,
    transform_proposals,
)
from detectron2.data.transforms import TransformList
from detectron2.structures import BoxMode

from elsa_core.runtime.errors import DamagedFileError, UsageError, one_line

from .augmentation import configure_augmentation
from .keypoints import fill_keypoints
from .safe_loading import read_image, read_map, to_tensor

logger = logging.getLogger(__name__)


class DetectionMapper(DatasetMapper):
    """DatasetMapper with the resize and the crop of INPUT, and with OpenMMLab's masks.

    With INPUT.MASK_FORMAT "bitmask", polygons are drawn at the size of the image and then resized,
    cropped and flipped with it. Boxes with an edge under a pixel, or outside the image, are
    dropped; a box whose mask a crop empties is kept, as in OpenMMLab.

    Raises:
        DamagedFileError: naming the file, for an image that cannot be read or has another size than
            its annotations say, and for masks that cannot be used.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        options = super().from_config(cfg, is_train)
        augmentations = configure_augmentation(cfg, options["augmentations"], is_train)
        return {**options, "augmentations": augmentations}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """As DatasetMapper's, but reads images by the rule of `safe_loading`."""
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
        if self.use_keypoint:
            fill_keypoints(dataset_dict["annotations"], 3 * len(self.keypoint_hflip_indices))
        try:
            self._transform(dataset_dict, transforms, image_shape)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(
                f"the annotations of image {name} cannot be used: {one_line(error)}"
            ) from error

    def _transform(
        self, dataset_dict: dict[str, Any], transforms: TransformList, image_shape: tuple[int, int]
    ) -> None:
        if not self.use_instance_mask or self.instance_mask_format != "bitmask":
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        size = dataset_dict["height"], dataset_dict["width"]
        kept = []
        for annotation in dataset_dict.pop("annotations"):
            if annotation.get("iscrowd", 0) or not _has_area(annotation, size):
                continue
            polygons = annotation.get("segmentation")
            if isinstance(polygons, list):
                parts = pycocotools.mask.frPyObjects(polygons, *size)
                annotation["segmentation"] = pycocotools.mask.merge(parts)
            if not self.use_keypoint:
                annotation.pop("keypoints", None)
            kept.append(
                transform_instance_annotations(
                    annotation,
                    transforms,
                    image_shape,
                    keypoint_hflip_indices=self.keypoint_hflip_indices,
                )
            )
        instances = annotations_to_instances(kept, image_shape, mask_format="bitmask")
        if self.recompute_boxes:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = filter_empty_instances(instances, by_mask=False)


def _has_area(annotation: dict[str, Any], size: tuple[int, int]) -> bool:
    """Whether both edges of a box are a pixel or longer, and it overlaps the image (h, w)."""
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    left, top, right, bottom = box
    large = right - left >= 1 and bottom - top >= 1
    return large and right > 0 and bottom > 0 and left < size[1] and top < size[0]


def training_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """Returns the records of DATASETS.TRAIN that are trained, see `detection_dicts`."""
    return detection_dicts(
        cfg.DATASETS.TRAIN,
        cfg.DATALOADER.MIN_IMAGE_SIZE,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE * cfg.MODEL.KEYPOINT_ON,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )


def detection_dicts(
    names: str | Sequence[str], min_image_size: int = 0, **options: Any
) -> list[dict[str, Any]]:
    """Detectron2's `get_detection_dataset_dicts` without small images.

    Args:
        names: names of data sets.
        min_image_size: images with an edge under this many pixels are dropped.
        options: of `get_detection_dataset_dicts`, which drops images without objects by default.

    Raises UsageError if no image is left.
    """
    entries = get_detection_dataset_dicts(names, **options)
    kept = [entry for entry in entries if min(entry["height"], entry["width"]) >= min_image_size]
    if len(kept) < len(entries):
        logger.info(
            f"Left out {len(entries) - len(kept)} images with an edge under {min_image_size} pixels"
        )
    if not kept:
        raise UsageError(
            "no training image has both edges of at least DATALOADER.MIN_IMAGE_SIZE "
            f"{min_image_size} pixels"
        )
    return kept
