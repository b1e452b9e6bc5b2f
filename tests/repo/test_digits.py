"""The digits data set: what its files hold, and which folders it may fill."""

import json
import os
import socket
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.datasets import load_digits

from elsa_core.runtime.errors import UsageError
from examples.digits import dataset as digits
from examples.digits import painter as digit_painter
from examples.digits.dataset import CLASSES, make_dataset
from examples.digits.painter import PARTS, PHOTOGRAPHS, Painter, split_digits

SMALL = {"train": 6, "val": 4, "size": 64, "progress": False}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    make_dataset(folder, train=40, val=30, size=96, progress=False)
    return folder


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def annotations(folder, part):
    return json.loads((folder / "annotations" / f"instances_{part}.json").read_text())


def test_same_options_give_the_same_bytes_and_other_seeds_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_dataset(tmp_path / name, seed=seed, **SMALL)
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    assert first.keys() == other.keys()
    pixels = [name for name in first if name.suffix in {".jpg", ".png"}]
    assert len(pixels) == 20
    assert all(first[name] != other[name] for name in pixels)


def test_an_image_does_not_depend_on_how_many_are_made(tmp_path):
    make_dataset(tmp_path / "few", **SMALL)
    make_dataset(tmp_path / "more", **{**SMALL, "train": 9, "val": 7})
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    shared = [name for name in few if name.suffix in {".jpg", ".png"}]
    assert len(shared) == 20
    assert all(few[name] == more[name] for name in shared)


def test_layout_and_meta(dataset):
    names = {name.as_posix() for name in contents(dataset)}
    assert names == {"meta.json", *digits._files({"images": {"training": 40, "validation": 30}})}
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


def test_categories_and_required_fields(dataset):
    for part in PARTS:
        coco = annotations(dataset, part)
        assert [(c["id"], c["name"]) for c in coco["categories"]] == list(enumerate(CLASSES, 1))
        assert {"info", "licenses", "images", "categories", "annotations"} == coco.keys()
        assert [image["id"] for image in coco["images"]] == list(range(1, len(coco["images"]) + 1))
        ids = [a["id"] for a in coco["annotations"]]
        assert ids == list(range(1, len(ids) + 1))
        labels = load_digits().target
        for a in coco["annotations"]:
            assert a["iscrowd"] == 0
            assert a["category_id"] == labels[a["digit_index"]] + 1
        for image in coco["images"]:
            pixels = cv2.imread(str(dataset / "images" / part / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3) == (96, 96, 3)


def test_all_classes_occur_and_images_hold_two_to_four_digits(dataset):
    for part in PARTS:
        coco = annotations(dataset, part)
        assert {a["category_id"] for a in coco["annotations"]} == set(range(1, 11))
        counts = np.bincount([a["image_id"] for a in coco["annotations"]])[1:]
        assert set(counts) == {2, 3, 4}


def test_masks_areas_boxes_and_label_maps_agree(dataset):
    overlapping = 0
    for part in PARTS:
        coco = COCO(dataset / "annotations" / f"instances_{part}.json")
        for image in coco.loadImgs(coco.getImgIds()):
            path = dataset / "annotations" / part / image["file_name"].replace(".jpg", ".png")
            labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert labels.dtype == np.uint8 and labels.shape == (96, 96)
            expected = np.ones((96, 96), dtype=np.uint8)
            covered = np.zeros((96, 96), dtype=int)
            for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
                mask = coco.annToMask(annotation).astype(bool)
                ys, xs = np.nonzero(mask)
                box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                assert annotation["bbox"] == box
                assert annotation["area"] == mask.sum() > 20
                assert annotation["area"] == coco_mask.area(annotation["segmentation"])
                expected[mask] = annotation["category_id"] + 1
                covered += mask
            assert covered.max() == 1
            assert (labels == expected).all()
        boxes = coco_boxes(coco)
        overlapping += sum(ious.max() > 0.05 for ious in boxes if ious.size)
    assert overlapping > 5


def coco_boxes(coco):
    """Off-diagonal box IoU of each image's objects."""
    for image_id in coco.getImgIds():
        boxes = np.array([a["bbox"] for a in coco.loadAnns(coco.getAnnIds(image_id))])
        ious = coco_mask.iou(boxes, boxes, [0] * len(boxes))
        yield ious[~np.eye(len(boxes), dtype=bool)]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ground_truth_scores_full_average_precision_against_itself(dataset, kind, capsys):
    for part in PARTS:
        truth = COCO(dataset / "annotations" / f"instances_{part}.json")
        results = [{**a, "score": 1.0} for a in truth.dataset["annotations"]]
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0)


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


def test_second_run_does_nothing(tmp_path):
    out = tmp_path / "data"
    assert make_dataset(out, **SMALL).made
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again = make_dataset(out, **SMALL)
    assert not again.made and again.images == {"training": 6, "validation": 4}
    assert not make_dataset(out, **SMALL, force=True).made
    assert stamps == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_other_options_need_force(tmp_path):
    out = tmp_path / "data"
    make_dataset(out, **SMALL)
    before = contents(out)
    with pytest.raises(UsageError, match=r"train=6 val=4 size=64 seed=0 .*--force"):
        make_dataset(out, **{**SMALL, "train": 5})
    assert contents(out) == before
    assert make_dataset(out, **{**SMALL, "train": 5}, force=True).images["training"] == 5
    assert len(list((out / "images" / "training").iterdir())) == 5
    assert os.listdir(tmp_path) == ["data"]


def test_other_generator_version_needs_force(tmp_path, monkeypatch):
    out = tmp_path / "data"
    make_dataset(out, **SMALL)
    monkeypatch.setattr(digits, "VERSION", digits.VERSION + 1)
    before = digits.VERSION - 1
    with pytest.raises(UsageError, match=rf"generator version {before}\).*--force"):
        make_dataset(out, **SMALL)
    assert make_dataset(out, **SMALL, force=True).made


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damaged_data_set_is_noticed_and_replaced_only_with_force(tmp_path, damage):
    out = tmp_path / "data"
    make_dataset(out, **SMALL)
    before = contents(out)
    victim = out / "images" / "validation" / "000002.jpg"
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"changed or missing files.*--force"):
        make_dataset(out, **SMALL)
    assert make_dataset(out, **SMALL, force=True).made
    assert contents(out) == before


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


def test_files_of_others_inside_a_data_set_survive_force(tmp_path):
    out = tmp_path / "data"
    make_dataset(out, **SMALL)
    (out / "images" / "notes.txt").write_text("mine")
    assert not make_dataset(out, **SMALL).made
    with pytest.raises(UsageError, match="images/notes.txt"):
        make_dataset(out, **{**SMALL, "train": 5}, force=True)
    assert (out / "images" / "notes.txt").read_text() == "mine"


def test_empty_folders_and_links_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty", target_is_directory=True)
    assert make_dataset(tmp_path / "link", **SMALL).made
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "meta.json").is_file()


def test_an_exception_midway_leaves_nothing(tmp_path, monkeypatch):
    out = tmp_path / "data"
    draw = Painter.draw

    def fail_at_three(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return draw(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Painter, "draw", fail_at_three)
        with pytest.raises(KeyboardInterrupt):
            make_dataset(out, **SMALL)
    assert os.listdir(tmp_path) == []
    assert make_dataset(out, **SMALL).made


def test_a_failed_replacement_keeps_the_old_data_set(tmp_path, monkeypatch):
    out = tmp_path / "data"
    make_dataset(out, **SMALL)
    before = contents(out)
    rename = Path.rename

    def refuse_new(self, target):
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse_new)
        with pytest.raises(OSError, match="No space left"):
            make_dataset(out, **{**SMALL, "train": 5}, force=True)
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["data"]
