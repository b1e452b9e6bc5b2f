"""Single digits in ImageNet's layout, cut out of the digits data set."""

import json
import shutil
from collections import Counter

import cv2
import numpy as np
import pytest

from examples.digits.dataset import CLASSES
from examples.digits.imagenet_layout import PARTS, write_layout


@pytest.fixture(scope="module")
def layout(digits, tmp_path_factory):
    """The written folder, and how many images the writer says it has."""
    out = tmp_path_factory.mktemp("imagenet")
    return out, write_layout(digits, out, progress=False)


def annotations(digits, part):
    return json.loads((digits / f"annotations/instances_{PARTS[part]}.json").read_text())


def place(annotation):
    return f"{annotation['category_id'] - 1}/{annotation['id']:06d}.JPEG"


def test_each_digit_is_one_image_in_the_folder_of_its_class(digits, layout):
    out, count = layout
    assert len([path for path in out.rglob("*") if path.is_file()]) == count
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]
    for part in PARTS:
        assert sorted(path.name for path in (out / part).iterdir()) == sorted(CLASSES)
        wanted = Counter(map(place, annotations(digits, part)["annotations"]))
        found = [p.relative_to(out / part).as_posix() for p in (out / part).rglob("*.JPEG")]
        assert Counter(found) == wanted and found


def test_image_shows_its_digit_with_a_margin(digits, layout):
    out, _ = layout
    content = annotations(digits, "train")
    for annotation in content["annotations"]:
        image_file = digits / f"images/training/{annotation['image_id']:06d}.jpg"
        image = cv2.imread(str(image_file)).astype(np.float32)
        crop = cv2.imread(str(out / "train" / place(annotation))).astype(np.float32)
        side = crop.shape[0]
        x, y, w, h = annotation["bbox"]
        assert crop.shape == (side, side, 3) and side >= min(round(1.3 * max(w, h)), 96)
        # Where in the image is it? All of the box must be inside.
        score = cv2.matchTemplate(image, crop, cv2.TM_SQDIFF)
        _, _, (left, top), _ = cv2.minMaxLoc(score)
        assert left <= x and top <= y and x + w <= left + side and y + h <= top + side
        assert np.abs(crop - image[top : top + side, left : left + side]).mean() < 4  # JPEG again


def test_class_without_an_image_keeps_its_folder(digits, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(digits, source)
    out.mkdir()
    content = annotations(digits, "val")
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 4]
    (source / "annotations/instances_validation.json").write_text(json.dumps(content))
    write_layout(source, out, progress=False)
    assert (out / "val/3").is_dir() and not list((out / "val/3").iterdir())
    assert list((out / "val/4").iterdir())
