"""What a file of annotations has: images, and objects by class and size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from elsa_core.data.coco import load_coco

SMALL, LARGE = 32**2, 96**2  # pixels, as COCO tells sizes apart


@dataclass(frozen=True)
class Contents:
    """Counts of a file of annotations; crowds and ignored objects are left out.

    ``sizes`` are "WIDTHxHEIGHT" of the smallest and the largest image by area.
    """

    images: int
    empty: int
    sizes: tuple[str, str]
    by_class: Mapping[str, int]
    by_size: Mapping[str, int]

    @classmethod
    def of(cls, path: str) -> Contents:
        """Raises UsageError for a file with errors."""
        coco = load_coco(path)
        objects = [one for one in coco.get("annotations") or [] if not one["iscrowd"]]
        names = {one["id"]: one["name"] for one in coco["categories"]}
        classes = Counter(names[one["category_id"]] for one in objects)
        areas = [one["area"] for one in objects]
        small, large = (
            sum(area < SMALL for area in areas),
            sum(area > LARGE for area in areas),
        )
        order = sorted(coco["images"], key=lambda one: one["width"] * one["height"])
        first, last = (f"{one['width']}x{one['height']}" for one in (order[0], order[-1]))
        medium = len(areas) - small - large
        return cls(
            images=len(order),
            empty=len(order) - len({one["image_id"] for one in objects}),
            sizes=(first, last),
            by_class={name: classes[name] for name in names.values()},
            by_size={"small": small, "medium": medium, "large": large},
        )

    @property
    def objects(self) -> int:
        return sum(self.by_class.values())
