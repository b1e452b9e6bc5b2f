"""The digits data set in COCO's panoptic format says what its label maps and instances say."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from elsa_core.data.panoptic import to_ids
from examples.digits.layouts import make_layout


def test_segments_are_the_digits_and_the_background(tmp_path, digits):
    data = tmp_path / "data"
    make_layout("panoptic", data, train=16, val=8, size=96, seed=0, progress=False)
    panoptic = json.loads((data / "annotations/panoptic_validation.json").read_text())
    instances = json.loads((data / "annotations/instances_validation.json").read_text())
    assert [one["isthing"] for one in panoptic["categories"]] == [1] * 10 + [0]
    assert len(panoptic["annotations"]) == 8
    for entry in panoptic["annotations"]:
        with Image.open(data / "annotations/panoptic_validation" / entry["file_name"]) as file:
            ids = to_ids(np.asarray(file))
        labels = np.zeros_like(ids)
        masks = [a for a in instances["annotations"] if a["image_id"] == entry["image_id"]]
        for segment in entry["segments_info"]:
            own = ids == segment["id"]
            labels[own] = segment["category_id"] % 11 + 1  # as in ADE20K's layout
            left, top, width, height = segment["bbox"]
            assert own.sum() == own[top : top + height, left : left + width].sum()
            assert segment["area"] == own.sum()
            same = [np.array_equal(coco_mask.decode(a["segmentation"]), own) for a in masks]
            assert sum(same) == (segment["category_id"] != 11)
        stem = entry["file_name"]
        with Image.open(digits / "annotations/validation" / stem) as file:
            assert np.array_equal(np.asarray(file), labels)
