"""A small digits data set and what its files hold, for tests of them."""

import numpy as np
from pycocotools import mask as coco_mask

SMALL = {"train": 6, "val": 4, "size": 64, "progress": False}


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def checked_objects(coco, image, labels):
    """The objects of an image, of which boxes, areas, masks and label map agree."""
    expected = np.ones_like(labels)
    objects = coco.loadAnns(coco.getAnnIds(image["id"]))
    for one in objects:
        mask = coco.annToMask(one).astype(bool)
        ys, xs = np.nonzero(mask)
        assert one["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        assert one["area"] == mask.sum() == coco_mask.area(one["segmentation"])
        assert (expected[mask] == 1).all()  # no pixel of another
        expected[mask] = one["category_id"] + 1
    assert (labels == expected).all()
    return objects
