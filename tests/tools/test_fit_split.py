"""The validation part that is split off, and what stays as the source has it."""

import json
import shutil
from dataclasses import replace
from unittest.mock import ANY

import fit_folders
import numpy as np
import pytest
from digit_files import contents
from fit_folders import write
from PIL import Image

from elsa_core.data.images import image_header, read_image
from elsa_core.runtime.errors import UsageError
from elsa_tools.fit.sources import prepare
from elsa_tools.fit.sources.split import Entry, choose


def entries(names, classes=(("a",),), copies=()):
    """Images in turn of the classes; those in `copies` are of one content."""
    return [
        Entry(name, "same" if name in copies else name, frozenset(classes[n % len(classes)]))
        for n, name in enumerate(names)
    ]


def chosen(found, share=0.2):
    numbers, sentence = choose(found, share)
    return {found[number].name for number in numbers}, sentence


PHOTOS = [f"{number:06d}.jpg" for number in range(50)]


@pytest.mark.parametrize(("share", "count"), [(0.2, 10), (0.5, 25), (0.9, 45), (0.001, 1)])
def test_the_share(share, count):
    names, sentence = chosen(entries(PHOTOS), share)
    assert len(names) == count
    assert sentence == (
        f"{count} of 50 images were split off for validation, by a hash of their names"
    )


def test_the_choice_depends_on_names_alone():
    names, _ = chosen(entries(PHOTOS))
    assert chosen(entries(PHOTOS[::-1]))[0] == names
    assert names != set(PHOTOS[:10]) and names != set(PHOTOS[-10:])
    # Most of the choice stays when an image is added.
    assert len(chosen(entries([*PHOTOS, "new.jpg"]))[0] & names) >= 9


def test_every_class_is_in_both_parts_where_it_can_be():
    rare = entries(PHOTOS, [("a",)])
    rare[3] = Entry(PHOTOS[3], "3", frozenset({"a", "once"}))
    for place in (7, 21, 40):
        rare[place] = Entry(PHOTOS[place], str(place), frozenset({"thrice"}))
    names, _ = chosen(rare)
    assert PHOTOS[3] not in names  # the only one of its class
    assert len(names & {PHOTOS[place] for place in (7, 21, 40)}) in (1, 2)
    assert len(names) == 10


@pytest.mark.parametrize(
    "frame", ["clip-{c}_frame_{n:04d}.png", "{c}/video{n}.jpg", "dir/cam {c} ({c})-{n}.jpg"]
)
def test_frames_of_a_video_stay_together(frame):
    made = [frame.format(c=c, n=n) for c in "abcdefghij" for n in range(12)]
    names, sentence = chosen(entries(made))
    groups = {c: {frame.format(c=c, n=n) for n in range(12)} for c in "abcdefghij"}
    assert sum(group <= names for group in groups.values()) == 2 and len(names) == 24
    assert "whole groups of names that differ in their last number (10)" in sentence


def test_one_video_is_no_group():
    names, sentence = chosen(entries([f"frame_{n}.jpg" for n in range(20)]))
    assert len(names) == 4 and sentence.endswith("give a validation part of your own")


def test_names_that_begin_with_the_class_are_no_frames():
    made = [f"{c}_{n:02d}.jpg" for n in range(10) for c in ("ape", "bee", "cow")]
    names, sentence = chosen(entries(made, [("ape",), ("bee",), ("cow",)]))
    assert len(names) == 6 and {name[:3] for name in names} == {"ape", "bee", "cow"}
    assert sentence.endswith("by a hash of their names")


def test_three_videos_give_one_to_validation():
    made = [f"{c}_{n:02d}.jpg" for n in range(10) for c in ("ape", "bee", "cow")]
    names, _ = chosen(entries(made))
    assert len(names) == 10 and len({name[:3] for name in names}) == 1


def test_what_roboflow_made_of_one_image_stays_together():
    made = [f"IMG_{n}_jpg.rf.{c}0f.jpg" for n in range(10) for c in "abc"]
    names, _ = chosen(entries(made))
    assert len(names) == 6
    assert all(sum(f"IMG_{n}_" in name for name in names) in (0, 3) for n in range(10))


def test_copies_of_one_image_stay_together():
    for first in range(40):
        copies = PHOTOS[first : first + 8]
        names, _ = chosen(entries(PHOTOS, copies=copies))
        assert len(names & set(copies)) in (0, 8)


def test_a_class_in_each_image_leaves_one_to_validation():
    found = entries(["a.jpg", "b.jpg", "c.jpg"], [("a",), ("b",), ("c",)])
    assert len(chosen(found)[0]) == 1


def test_validation_has_an_object():
    for number in range(20):
        found = entries(PHOTOS[:20], [()])
        found[number] = Entry(PHOTOS[number], "1", frozenset("a"))
        found[(number + 7) % 20] = Entry(PHOTOS[(number + 7) % 20], "2", frozenset("a"))
        names, _ = chosen(found, 0.1)
        assert len(names & {PHOTOS[number], PHOTOS[(number + 7) % 20]}) == 1


def test_one_image_is_too_few():
    with pytest.raises(UsageError, match="need an image each, got 2 copies of one image"):
        choose(entries(["a.jpg", "b.jpg"], copies=("a.jpg", "b.jpg")), 0.2)


@pytest.mark.parametrize("layout", ["label_studio", "yolo", "label_maps"])
def test_the_same_bytes_again_and_the_source_as_it_was(tmp_path, layout):
    root = tmp_path / "data"
    fit_folders.LAYOUTS[layout](root)
    before = contents(root)
    made = prepare(root, tmp_path / "one")
    assert contents(root) == before
    first = contents(tmp_path / "one")
    assert prepare(root, tmp_path / "one") == made and contents(tmp_path / "one") == first
    prepare(root, tmp_path / "two")
    assert contents(tmp_path / "two") == first
    # A folder inside of the source is no part of it.
    prepare(root, root / "out")
    prepare(root, root / "out")
    assert contents(root / "out") == first
    # Nor is a run.
    write(root / "out/fit.json", {})
    assert prepare(root, tmp_path / "two") == replace(made, train=ANY, val=ANY)


def test_links_of_another_split_are_removed(tmp_path):
    fit_folders.label_maps(tmp_path / "data")
    for share in (0.5, 0.2):
        made = prepare(tmp_path / "data", tmp_path / "out", validation=share)
        for part in (made.train, made.val):
            assert len(list(part.images.iterdir())) == len(list(part.maps.iterdir())) == part.count


def test_a_copy_of_a_validation_image_is_not_trained(tmp_path):
    root = tmp_path / "data"
    fit_folders.yolo(root)
    shutil.copy(root / "images/val/g.jpg", root / "images/train/b.jpg")
    made = prepare(root, tmp_path / "out")
    assert (made.train.count, made.val.count) == (5, 2)
    assert "b.jpg" not in made.train.annotations.read_text()
    (warning,) = made.warnings
    assert warning.startswith("1 images for training are copies of images for validation")


def test_validation_that_is_the_training_part_is_split_off(tmp_path):
    fit_folders.yolo(tmp_path / "data")
    file = tmp_path / "data/data.yaml"
    write(file, file.read_text().replace("val: images/val", "val: images/train"))
    made = prepare(tmp_path / "data", tmp_path / "out")
    assert (made.train.count, made.val.count) == (5, 1)
    assert made.split.startswith("1 of 6 images were split off")


def test_a_test_part_is_left_alone(tmp_path):
    fit_folders.roboflow(tmp_path / "data")
    (tmp_path / "data/valid").rename(tmp_path / "data/test")
    made = prepare(tmp_path / "data", tmp_path / "out")
    assert (made.train.count, made.val.count) == (5, 1)
    assert made.split.endswith("; the test part of 2 images is left for you")


@pytest.mark.parametrize("layout", ["single_json", "yolo"])
def test_one_of_several_files_by_its_name(tmp_path, layout):
    root = tmp_path / "data"
    fit_folders.LAYOUTS[layout](root)
    file = root / ("annotations.json" if layout == "single_json" else "data.yaml")
    for other in ("voc", "single_json", "yolo"):
        if other != layout:
            fit_folders.LAYOUTS[other](root)
    with pytest.raises(UsageError, match="COCO's format and YOLO's format and Pascal VOC's"):
        prepare(root, tmp_path / "out")
    assert prepare(file, tmp_path / "out").classes == fit_folders.CLASSES


def test_classes_without_training_image(tmp_path):
    fit_folders.roboflow(tmp_path / "data")
    file = tmp_path / "data/valid/_annotations.coco.json"
    content = json.loads(file.read_text())
    content["categories"].append({"id": 9, "name": "late", "supercategory": "shapes"})
    content["annotations"][0]["category_id"] = 9
    write(file, content)
    made = prepare(tmp_path / "data", tmp_path / "out")
    assert made.classes == ("square", "tall", "late")
    assert made.warnings == ("1 classes have no object for training: late",)


def test_categories_by_name_whatever_their_ids(tmp_path):
    fit_folders.digits(tmp_path / "data")
    file = tmp_path / "data/annotations/instances_validation.json"
    content = json.loads(file.read_text())
    swap = {3: 70, 4: 5}  # "tall" before "square"
    for one in content["categories"]:
        one["id"] = swap[one["id"]]
    for one in content["annotations"]:
        one["category_id"] = swap[one["category_id"]]
    write(file, content)
    val = json.loads(prepare(tmp_path / "data", tmp_path / "out").val.annotations.read_text())
    assert [one["category_id"] for one in val["annotations"]] == [1, 2]
    assert [one["name"] for one in val["categories"]] == ["square", "tall"]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_yolo_counts_in_the_image_as_the_loaders_turn_it(tmp_path, orientation):
    """The object is where the pixels are red after loading, whatever the file says."""
    fit_folders.yolo_boxes(tmp_path / "data")
    path = tmp_path / "data/images/train/c.png"
    (tmp_path / "data/images/train/c.jpg").unlink()
    shown = np.full((40, 60, 3), 255, np.uint8)
    shown[5:15, 30:54] = (255, 0, 0)
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(np.rot90(shown, turns))).save(path, exif=exif)
    assert (read_image(str(path)) == shown).all()
    assert image_header(str(path)) == (60, 40, False)
    write(tmp_path / "data/labels/train/c.txt", f"0 {42 / 60} 0.25 0.4 0.25")
    made = json.loads(prepare(tmp_path / "data", tmp_path / "out").train.annotations.read_text())
    (image,) = [one for one in made["images"] if one["file_name"] == "c.png"]
    assert (image["width"], image["height"]) == (60, 40)
    (one,) = [one for one in made["annotations"] if one["image_id"] == image["id"]]
    assert np.allclose(one["bbox"], [30, 5, 24, 10], atol=1e-3)


@pytest.mark.parametrize("first", [0, 1, 0.5])
def test_voc_boxes_from_1_or_edges(tmp_path, first):
    """Edges if the data set has a coordinate below 1 or between pixels."""
    root = tmp_path / "data"
    fit_folders.voc(root)
    for number in range(8):
        stem = fit_folders.name_of(number)[0]
        text = fit_folders.voc_xml(number, 0 if first == 0.5 else first)
        if first == 0.5:
            text = text.replace("<xmin>40", "<xmin>40.5").replace("<xmin>4<", "<xmin>4.5<")
        elif first == 0:
            text = text.replace("<xmin>4<", "<xmin>0<")
        write(root / f"Annotations/{stem}.xml", text)
    made = prepare(root, tmp_path / "out")
    content = json.loads(made.train.annotations.read_text())
    boxes = [one["bbox"] for one in content["annotations"]]
    left = {0: 0, 1: 4, 0.5: 4.5}[first]
    assert boxes[0] == [left, 6, 28 - left, 24]
    assert boxes[1] == [7, 6, 24, 24]
    assert ("edges from 0" if first != 1 else "pixels from 1, the last") in made.layout


def test_voc_difficult_is_ignored_and_sizes_may_be_missing(tmp_path):
    root = tmp_path / "data"
    fit_folders.voc(root)
    text = fit_folders.voc_xml(1).replace("<bndbox>", "<difficult>1</difficult><bndbox>", 1)
    write(root / "Annotations/b.xml", text.replace("96", "0").replace("64", "0", 1))
    content = json.loads(prepare(root, tmp_path / "out").train.annotations.read_text())
    flags = [one["iscrowd"] for one in content["annotations"] if one["image_id"] == 2]
    assert flags == [1, 0]
    assert (content["images"][1]["width"], content["images"][1]["height"]) == fit_folders.SIZE


def test_what_is_not_annotated_is_named(tmp_path):
    root = tmp_path / "data"
    for layout in ("voc", "label_maps", "single_json"):
        fit_folders.LAYOUTS[layout](root / layout)
    for part in ("Main/train", "Main/val"):
        (root / f"voc/ImageSets/{part}.txt").unlink()
    for folder in ("voc/JPEGImages", "label_maps/images", "single_json"):
        fit_folders.image(root / folder / "new.jpg")
    words = {
        "voc": "no XML",
        "label_maps": "without label map",
        "single_json": "no annotation file",
    }
    for layout, text in words.items():
        (warning,) = prepare(root / layout, tmp_path / "out").warnings
        assert text in warning and "new.jpg" in warning


def test_values_of_16_bits_are_named(tmp_path):
    fit_folders.cvat(tmp_path / "data")
    file = tmp_path / "data/images/default/b.jpg"
    Image.fromarray(np.zeros(fit_folders.SIZE[::-1], np.uint16)).save(file, format="PNG")
    (warning,) = prepare(tmp_path / "data", tmp_path / "out").warnings
    assert warning == f"1 images have 16 bits, of which the upper 8 are used: {file}"
