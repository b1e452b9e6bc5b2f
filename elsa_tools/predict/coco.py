"""Results in COCO's format, under the ids of a file of annotations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import elsa_core.data.coco
from elsa_core.runtime.errors import UsageError

from .results import Detections


class CocoResults:
    """What a detector finds, with the ids of images and categories in ``annotations``.

    ``entries`` is what `pycocotools.coco.COCO.loadRes` takes.

    Raises UsageError for a file that is not in COCO's format, or that lacks one of ``classes``.
    """

    def __init__(self, annotations: str, classes: Sequence[str]) -> None:
        self.annotations = annotations
        self.entries: list[dict[str, Any]] = []
        content = elsa_core.data.coco.load_coco(annotations)
        self.images = {image["file_name"]: image["id"] for image in content["images"]}
        categories = {category["name"]: category["id"] for category in content["categories"]}
        if unknown := [name for name in classes if name not in categories]:
            raise UsageError(
                f"the categories of {annotations} must have the names of the model's classes, "
                f"{unknown[0]!r} is not among them"
            )
        self.category_ids = [categories[name] for name in classes]

    def image_id(self, path: str) -> int:
        """Of the image whose ``file_name`` is the end of a path; UsageError where there is none."""
        parts = os.path.abspath(path).split(os.sep)
        for start in range(1, len(parts)):
            name = "/".join(parts[start:])
            if name in self.images:
                return self.images[name]
        raise UsageError(f"{self.annotations} has no image of the name of {path}")

    def add(self, path: str, found: Detections) -> None:
        self.entries += found.to_coco(self.image_id(path), self.category_ids)
