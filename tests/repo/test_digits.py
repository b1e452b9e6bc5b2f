"""The digits data set: what its files hold, and which folders it may fill."""

import json
import os
import socket
import sys

import cv2
import numpy as np
import pytest
from digit_files import SMALL, checked_objects, contents
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from elsa_core.runtime.errors import UsageError
from examples.digits import dataset as digits
from examples.digits import painter as digit_painter
from examples.digits.dataset import CLASSES, make_dataset
from examples.digits.painter import PARTS, PHOTOGRAPHS, Painter, split_digits


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    make_dataset(folder, train=40, val=30, size=96, progress=False)
    return folder


def annotations(folder, part):
    return json.loads((folder / "annotations" / f"instances_{part}.json").read_text())


def test_layout_and_meta(dataset):
    assert contents(dataset).keys() == {
        "meta.json",
        *digits._files({"images": {"training": 40, "validation": 30}}),
    }
    meta = json.loads((dataset / "meta.json").read_text())
    assert meta["options"] == {"train": 40, "val": 30, "size": 96, "seed": 0}
    assert meta["images"] == {"training": 40, "validation": 30}
    assert meta["objects"] == {p: len(annotations(dataset, p)["annotations"]) for p in PARTS}


def test_parts_share_neither_digits_nor_photographs(dataset):
    rows = split_digits(load_digits().target)
    used = {}
    for part in PARTS:
        coco = annotations(dataset, part)
        used[part] = {a["digit_index"] for a in coco["annotations"]}
        assert used[part] <= set(rows[part].tolist())
        assert {image["photograph"] for image in coco["images"]} <= set(PHOTOGRAPHS[part])
    assert not used["training"] & used["validation"]
    assert not set(PHOTOGRAPHS["training"]) & set(PHOTOGRAPHS["validation"])
    # One scene taken from two places: it must not be split between the parts.
    assert {"motorcycle_left.png", "motorcycle_right.png"} <= set(PHOTOGRAPHS["training"])


def test_annotations_label_maps_and_pixels_agree(dataset):
    truth = load_digits().target
    overlapping = 0
    for part in PARTS:
        coco = COCO(dataset / "annotations" / f"instances_{part}.json")
        assert {"info", "licenses", "images", "categories", "annotations"} == coco.dataset.keys()
        categories = [(one["id"], one["name"]) for one in coco.dataset["categories"]]
        assert categories == list(enumerate(CLASSES, 1))
        images, objects = coco.dataset["images"], coco.dataset["annotations"]
        assert [image["id"] for image in images] == list(range(1, len(images) + 1))
        assert [one["id"] for one in objects] == list(range(1, len(objects) + 1))
        assert {one["category_id"] for one in objects} == set(range(1, 11))
        for image in images:
            pixels = cv2.imread(str(dataset / "images" / part / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3) == (96, 96, 3)
            path = dataset / "annotations" / part / image["file_name"].replace(".jpg", ".png")
            labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert labels.dtype == np.uint8 and labels.shape == (96, 96)
            own = checked_objects(coco, image, labels)
            assert 2 <= len(own) <= 4 and all(one["area"] > 20 for one in own)
            for one in own:
                assert one["iscrowd"] == 0 and one["category_id"] == truth[one["digit_index"]] + 1
            boxes = np.array([one["bbox"] for one in own])
            overlaps = coco_mask.iou(boxes, boxes, [0] * len(boxes))
            overlapping += overlaps[~np.eye(len(boxes), dtype=bool)].max() > 0.05
    assert overlapping > 5


def test_makes_no_connection(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the generator asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setitem(sys.modules, "pooch", None)  # scikit-image's downloader
    for part in PARTS:
        painter = Painter(part, 64, seed=0)
        for name in PHOTOGRAPHS[part]:
            assert digit_painter._read_photograph(name).shape[2] == 3
        painter.draw(0)
    assert make_dataset(tmp_path / "data", **SMALL).made


@pytest.mark.parametrize("meta", [None, "{", "[]", '{"generator": "other"}'])
def test_a_folder_of_others_is_never_replaced(tmp_path, meta):
    (tmp_path / "thesis.txt").write_text("years of work")
    if meta is not None:
        (tmp_path / "meta.json").write_text(meta)
    before = contents(tmp_path)
    for force in (False, True):
        with pytest.raises(UsageError, match="holds other files"):
            make_dataset(tmp_path, **SMALL, force=force)
    assert contents(tmp_path) == before


def test_empty_folders_and_links_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty", target_is_directory=True)
    assert make_dataset(tmp_path / "link", **SMALL).made
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "meta.json").is_file()


@pytest.mark.parametrize("case", ["options", "version", "missing", "changed"])
def test_what_differs_needs_force(tmp_path, monkeypatch, case):
    out, options = tmp_path / "data", SMALL
    make_dataset(out, **SMALL)
    victim = out / "images" / "validation" / "000002.jpg"
    sentence = "changed or missing files"
    if case == "options":
        options, sentence = {**SMALL, "train": 5}, "train=6 val=4 size=64 seed=0 "
    elif case == "version":
        sentence = rf"generator version {digits.VERSION}\)"
        monkeypatch.setattr(digits, "VERSION", digits.VERSION + 1)
    elif case == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1])
    before = contents(out)
    with pytest.raises(UsageError, match=f"{sentence}.*--force"):
        make_dataset(out, **options)
    assert contents(out) == before
    assert make_dataset(out, **options, force=True).made
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again = make_dataset(out, **options, force=True)
    assert not again.made and again.images["training"] == options["train"]
    assert stamps == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert os.listdir(tmp_path) == ["data"]
