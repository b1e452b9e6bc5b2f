"""The digits data set with validation images of many sizes and kinds of file."""

from collections import Counter

import numpy as np
import pytest
from digit_files import checked_objects
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from examples.digits.layouts import make_layout
from examples.digits.mixed_layout import KINDS, SIZES

OPTIONS = {"train": 2, "val": 40, "size": 64, "progress": False}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return make_layout("mixed", tmp_path_factory.mktemp("mixed") / "data", **OPTIONS).path


@pytest.fixture(scope="module")
def coco(mixed):
    return COCO(mixed / "annotations/instances_validation.json")


def seen(mixed, image):
    """The picture of an entry as one sees it, and the file's mode and orientation."""
    with Image.open(mixed / "images/validation" / image["file_name"]) as file:
        return ImageOps.exif_transpose(file), file.mode, file.getexif().get(274, 1)


def test_forty_images_have_all_sizes_kinds_and_orientations(mixed, coco):
    images = coco.loadImgs(coco.getImgIds())
    modes = {"colour": "RGB", "grey": "L", "rgba": "RGBA", "turned": "RGB", "16-bit": "I;16"}
    orientations = Counter()
    for image in images:
        picture, mode, orientation = seen(mixed, image)
        assert picture.size == (image["width"], image["height"])
        assert mode == modes[image["kind"]]
        assert (orientation != 1) == (image["kind"] == "turned")
        orientations[orientation] += 1
    assert len(images) == 40 and {image["kind"] for image in images} == set(KINDS)
    assert len({(image["width"], image["height"]) for image in images}) == len(SIZES) + 1
    assert set(orientations) == set(range(1, 9))


def test_masks_boxes_and_label_maps_lie_on_the_digits(mixed, coco):
    for image in coco.loadImgs(coco.getImgIds()):
        picture, *_ = seen(mixed, image)
        picture = np.asarray(picture.convert("RGBA" if image["kind"] == "rgba" else None))
        grey = picture if picture.ndim == 2 else picture[..., :3].mean(-1)
        with Image.open(mixed / f"annotations/validation/{image['id']:06d}.png") as file:
            labels = np.asarray(file)
        assert checked_objects(coco, image, labels)
        # Ink is brighter than what it covers: a mask that is turned wrongly is not.
        assert grey[labels > 1].mean() > grey[labels == 1].mean() * 1.1, image


def test_crowds_hold_more_than_a_hundred_digits(coco):
    counts = Counter(one["image_id"] for one in coco.dataset["annotations"])
    assert sorted(key for key, count in counts.items() if count > 100) == [1, 21]
    ids = [one["id"] for one in coco.dataset["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


def test_the_training_part_is_that_of_the_standard_layout(mixed, tmp_path):
    standard = make_layout("standard", tmp_path / "data", **{**OPTIONS, "val": 1}).path
    for file in standard.rglob("*training*/*"):
        assert (mixed / file.relative_to(standard)).read_bytes() == file.read_bytes()
