"""Keypoints: their names from a file in COCO's format, and checks before a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from elsa_core.runtime.errors import UsageError

# COCO's own sigmas, which evaluate where TEST.KEYPOINT_OKS_SIGMAS is empty.
COCO_SIGMAS = 17
_OTHER = {"left": "right", "right": "left"}


def set_keypoint_names(name: str, coco: Any) -> None:
    """Sets keypoint_names and keypoint_flip_map of a data set from its first category with
    ``keypoints``, their names, unless they are set.

    A mirrored image exchanges the keypoints whose names differ in "left" and "right" alone.
    """
    metadata = MetadataCatalog.get(name)
    categories = coco.get("categories") if isinstance(coco, dict) else None
    found = [one.get("keypoints") for one in categories or [] if isinstance(one, dict)]
    names = next((one for one in found if isinstance(one, list) and one), None)
    if metadata.get("keypoint_names") or not names:
        return
    names = [str(one) for one in names]
    pairs = [(one, re.sub("left|right", lambda side: _OTHER[side[0]], one)) for one in names]
    flips = [(one, other) for one, other in pairs if one < other and other in names]
    metadata.set(keypoint_names=names, keypoint_flip_map=flips)


def check_keypoints(cfg: CfgNode, name: str) -> None:
    """Raises UsageError for a data set with other keypoints than the model and the evaluation."""
    names: Sequence[str] = MetadataCatalog.get(name).get("keypoint_names") or ()
    if not names:
        raise UsageError(
            f"MODEL.KEYPOINT_ON needs the names of the keypoints of data set {name!r}: keypoints "
            "of its categories, or keypoint_names and keypoint_flip_map in its metadata"
        )
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if len(names) != number:
        raise UsageError(
            f"data set {name!r} has {len(names)} keypoints, but "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}"
        )
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or COCO_SIGMAS
    if sigmas != number:
        raise UsageError(
            f"TEST.KEYPOINT_OKS_SIGMAS must be a number for each of the {number} keypoints, "
            f"got {sigmas}{' of COCO' * (not cfg.TEST.KEYPOINT_OKS_SIGMAS)}"
        )


def wrong_keypoints(coco: dict[str, Any], number: int) -> str | None:
    """Returns half a sentence on the first annotation with another number of keypoints, or None."""
    for one in coco.get("annotations") or ():
        found = one.get("keypoints") or ()
        if found and len(found) != 3 * number:
            return (
                f"annotation {one['id']} must have {number} keypoints [x, y, visibility], "
                f"got {len(found)} numbers"
            )
    return None


def fill_keypoints(annotations: Sequence[dict[str, Any]], length: int) -> None:
    """Gives annotations without ``keypoints`` ``length`` zeros, of visibility 0, and all of them
    ``num_keypoints``, as pycocotools needs. In place."""
    for one in annotations:
        one["keypoints"] = one.get("keypoints") or [0] * length
        one["num_keypoints"] = sum(visible > 0 for visible in one["keypoints"][2::3])
