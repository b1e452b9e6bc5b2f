"""Folders in the usual layouts become the data set that was written into them."""

from pathlib import Path

import fit_folders
import numpy as np
import pytest
from pycocotools.coco import COCO

from elsa_core.data.images import read_image
from elsa_tools.fit.dataset import BOXES, INSTANCES, SEMANTIC
from elsa_tools.fit.sources import prepare

GIVEN = {"roboflow", "digits", "yolo", "yolo_boxes", "voc"}  # with a validation part
TASKS = {
    **dict.fromkeys(fit_folders.INSTANCES, INSTANCES),
    **dict.fromkeys(fit_folders.BOXES, BOXES),
    **dict.fromkeys(fit_folders.SEMANTIC, SEMANTIC),
}


def number_of(path):
    return "abcdefgh".index(Path(path).stem[-1])


def objects_of(part, masks):
    """{number of an image: objects (class, left, top, width, height)}, as pycocotools reads them.

    Checks that each image is there and as large as its entry says.
    """
    coco, found = COCO(str(part.annotations)), {}
    for image in coco.imgs.values():
        pixels = read_image(str(part.images / image["file_name"]))
        assert pixels.shape[:2] == (image["height"], image["width"])
        mine = coco.imgToAnns[image["id"]]
        for one in mine:
            assert ("segmentation" in one) == masks
            if masks:
                x, y, w, h = (round(value) for value in one["bbox"])
                expected = np.zeros(pixels.shape[:2], bool)
                expected[y : y + h, x : x + w] = True
                assert (coco.annToMask(one).astype(bool) == expected).all()
            assert one["area"] == pytest.approx(one["bbox"][2] * one["bbox"][3], abs=0.1)
        found[number_of(image["file_name"])] = [
            (one["category_id"] - 1, *np.round(one["bbox"], 2)) for one in mine
        ]
    return found


@pytest.mark.parametrize("layout", [*fit_folders.INSTANCES, *fit_folders.BOXES])
def test_objects_are_those_of_the_source(tmp_path, layout):
    fit_folders.LAYOUTS[layout](tmp_path / "data")
    made = prepare(tmp_path / "data", tmp_path / "out")
    assert (made.task, made.classes) == (TASKS[layout], fit_folders.CLASSES)
    train, val = (objects_of(part, made.task == INSTANCES) for part in (made.train, made.val))
    assert (len(train), len(val)) == (made.train.count, made.val.count) == (6, 2)
    assert {**train, **val} == {n: fit_folders.objects(n) for n in range(8)}
    assert (set(val) == set(fit_folders.VAL)) == (layout in GIVEN)
    assert not made.warnings
