"""Data sets in COCO's format for MMDetection, whose labels follow the class names.

MMDetection numbers the categories in the order of the file, whatever the order of the classes.
Configs name these by their place, because they need MMDetection:
`dict(type="elsa_mm.coco.CocoDataset", metainfo=dict(classes=...), ...)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import mmdet.datasets
from mmengine.logging import print_log

from elsa_core.data.classes import labels_by_name, ordered_names
from elsa_core.runtime.errors import UsageError

from .coco_metric import CheckedCOCO


class ByName:
    """Mixin for MMDetection's indices of a file: category ids in the order of the given names."""

    path = ""
    dataset: dict[str, Any]

    def __init__(self, annotation_file: str | None = None, *args: Any, **options: Any) -> None:
        super().__init__(annotation_file, *args, **options)  # type: ignore[call-arg]
        self.path = annotation_file or ""

    def get_cat_ids(
        self, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (), cat_ids: Sequence = ()
    ) -> list[Any]:
        """If only names are given: the id of each, in their order.

        Raises UsageError where the file lacks one.
        """
        if not cat_names or sup_names or cat_ids:
            return super().get_cat_ids(cat_names, sup_names, cat_ids)  # type: ignore[misc]
        categories = self.dataset["categories"]
        try:
            ids = list(labels_by_name(cat_names, categories, others=True))
        except UsageError as error:
            raise UsageError(f"annotation file {self.path}: {error}") from error
        if [name for name in ordered_names(categories) if name in cat_names] != list(cat_names):
            print_log(f"{self.path}: the categories are mapped to the classes by name", "current")
        self._tell_of_others(set(ids))
        return ids

    def annotations(self) -> list[dict[str, Any]]:
        return self.dataset.get("annotations") or []

    def _tell_of_others(self, ids: set[Any]) -> None:
        """Warns of objects whose category is no class: it may be misspelt."""
        counts = Counter(one["category_id"] for one in self.annotations())
        names = {one["id"]: one["name"] for one in self.dataset["categories"]}
        if left := [f"{names[key]} ({n})" for key, n in counts.items() if key not in ids]:
            print_log(
                f"{self.path}: annotations of categories that are no class are left out: "
                + ", ".join(sorted(left)),
                "current",
                level=30,
            )


class NamedCOCO(ByName, CheckedCOCO):
    """MMDetection's index of a file of instances, with `ByName`."""


class _Named:
    """What both data sets share; ``run_lengths`` counts objects whose masks are no polygons."""

    COCOAPI = NamedCOCO
    run_lengths = 0

    def load_data_list(self) -> list[dict[str, Any]]:
        images = super().load_data_list()  # type: ignore[misc]
        self.run_lengths = sum(
            isinstance(one.get("mask"), dict) and not one["ignore_flag"]
            for image in images
            for one in image["instances"]
        )
        return images


class CocoDataset(_Named, mmdet.datasets.CocoDataset):
    """CocoDataset whose label i is the category with the name of class i of the metainfo."""


class CityscapesDataset(_Named, mmdet.datasets.CityscapesDataset):
    """CityscapesDataset with the same rule."""
