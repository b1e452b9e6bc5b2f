"""Folders that cannot be used end in one sentence, before anything is written."""

import json

import fit_folders
import numpy as np
import pytest
from fit_folders import SIZE, image, label_map, write
from PIL import Image

from elsa_core.runtime.errors import UsageError
from elsa_tools.fit.sources import prepare


def changed(file, old, new):
    """Change the text of a file in a folder."""

    def change(root):
        path = root / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def removed(*files):
    def change(root):
        for file in files:
            (root / file).unlink()

    return change


def edited(file, edit):
    """Change the content of a JSON."""

    def change(root):
        content = json.loads((root / file).read_text())
        edit(content)
        (root / file).write_text(json.dumps(content))

    return change


def cut(file):
    def change(root):
        (root / file).write_bytes((root / file).read_bytes()[:-40])

    return change


def turned(root):
    """Stored upright with an orientation of 6; the annotations mean the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(root / "c.jpg", exif=exif)


def labelled_by(text):
    return lambda root: write(root / "labels/train/c.txt", text)


BOMB = '<!DOCTYPE a [<!ENTITY a "a"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>'
COCO, YOLO, VOC = "annotations.json", "data.yaml", "Annotations/c.xml"
SINGLE, LABELS = fit_folders.single_json, fit_folders.yolo
BOXES, XML, MAPS = fit_folders.yolo_boxes, fit_folders.voc, fit_folders.label_maps
PNG = "masks/c.png"

# Layout, what changes it, words of the sentence.
CASES = {
    "empty": (lambda root: root.mkdir(), None, "none of them, but 0 images"),
    "two layouts": (XML, LABELS, "YOLO's format and Pascal VOC's format: name the"),
    "labels without names": (LABELS, removed(YOLO), "without a data.yaml or classes.txt"),
    "another JSON": (
        lambda root: write(root / "a.json", {"shapes": []}),
        None,
        "but a.json: export it as COCO",
    ),
    "another XML": (
        lambda root: write(root / "a.xml", "<annotations/>"),
        None,
        "but a.xml: export it as COCO or Pascal VOC",
    ),
    "JSON cut off": (SINGLE, cut(COCO), "annotations.json is cut off"),
    "two files of a part": (
        SINGLE,
        lambda root: write(root / "more.json", fit_folders.coco([0])),
        "must have one annotation file, or one of each part",
    ),
    "image missing": (SINGLE, removed("c.jpg"), "1 of 8 images have no file in .*, the first is c"),
    "image cut off": (SINGLE, cut("c.jpg"), "image .*c.jpg cannot be read: "),
    "image of another size": (SINGLE, lambda root: Image.new("L", (5, 9)).save(root / "c.jpg"),
                              r"c.jpg is 5x9 pixels, its annotations say 96x64 \(.*annotations.js"),
    "image that is turned": (SINGLE, turned, "is 64x96 pixels, turned as its EXIF .* say 96x64"),
    "name of two files": (
        SINGLE,
        lambda root: [(root / "c.jpg").rename(root / "z.jpg"), image(root / "x/c.jpg"),
                      image(root / "y/c.jpg")],
        "image c.jpg may be any of x/c.jpg, y/c.jpg",
    ),
    "file of two names": (
        SINGLE,
        edited(COCO, lambda one: [one["images"][n].update(file_name=f"{n}/c.jpg") for n in (1, 2)]),
        "several images stand for the one file c.jpg",
    ),
    "box of words": (
        SINGLE,
        edited(COCO, lambda one: one["annotations"][0].update(bbox=["a", 1, 2, 3])),
        "annotation 1 must have a bbox of 4 numbers, got .*'a'",
    ),
    "category twice": (
        SINGLE,
        edited(COCO, lambda one: one["categories"][1].update(name="square")),
        "annotations.json: category 4 has the name 'square', which is used twice",
    ),
    "unknown category": (
        SINGLE,
        edited(COCO, lambda one: one["annotations"][0].update(category_id=9)),
        "annotations.json: annotation 1 has category 9",
    ),
    "box of NaN": (
        SINGLE,
        edited(COCO, lambda one: one["annotations"][0].update(bbox=[1, 1, float("nan"), 5])),
        "annotation 1 must have a bbox of 4 numbers, got .*nan",
    ),
    "no annotation": (
        SINGLE, edited(COCO, lambda one: one["annotations"].clear()), "no annotation is an object"
    ),
    "one image": (lambda root: [image(root / "a.jpg"), write(root / COCO, fit_folders.coco([0]))],
                  None, "training and validation need an image each, got 1"),
    "validation alone": (
        fit_folders.digits,
        removed("annotations/instances_training.json"),
        "must be for train and val, or of one part, got val",
    ),
    "names with a gap": (LABELS, changed(YOLO, "  1:", "  2:"), "count from 0 to 1, got keys 0, 2"),
    "another nc": (LABELS, changed(YOLO, "names", "nc: 3\nnames"), "nc .* number of names, 2, got"),
    "no such folder": (LABELS, changed(YOLO, "images/val", "images/va"), "val is images/va, but"),
    "no YAML": (LABELS, changed(YOLO, "path", "{"), "data.yaml is not YAML: "),
    "line of 6": (LABELS, labelled_by("0 .1 .1 .1 .1 .9"), "c.txt: line 1 must have 4 numbers, or"),
    "line of 4": (LABELS, labelled_by("\n0 .1 .1 .1"), "c.txt: line 2 must have 4 numbers, or"),
    "class 2 of 2": (LABELS, labelled_by("2 .1 .1 .1 .1"), "begin with a class of 0 to 1, got 2"),
    "class 0.5": (LABELS, labelled_by("0.5 .1 .1 .1 .1"), "a class of 0 to 1, got 0.5"),
    "value NaN": (LABELS, labelled_by("0 .1 nan .1 .1"), "line 1 must have finite numbers"),
    "a word": (LABELS, labelled_by("cat .1 .1 .1 .1"), "line 1 must have numbers only"),
    "pixels": (LABELS, labelled_by("0 9 9 20 20"), "fractions of the image, 0 to 1, got 20"),
    "labels in UTF-16": (LABELS, lambda root: (root / "labels/train/c.txt").write_bytes(b"\xff\0"),
                         "c.txt is not text in UTF-8"),
    "two YAMLs": (LABELS, lambda root: write(root / "b.yaml", "names: [a]\ntrain: images"),
                  "one file that names the classes of YOLO's labels, got b.yaml, data.yaml"),
    "names of a text": (LABELS, changed(YOLO, "names:", "names: a\nother:"), "a list of class"),
    "parts of a part": (LABELS, changed(YOLO, "train: ", "train:\n  a: "), "train must be a path"),
    "part without images": (LABELS, changed(YOLO, "images/val", "labels"), "which has no images"),
    "keypoints of words": (LABELS, changed(YOLO, "path", "kpt_shape: [a]\npath"), "kpt_shape must"),
    "listed image": (LABELS, lambda root: (changed(YOLO, "images/train", "t.txt")(root),
                                           write(root / "t.txt", "a.jpg")), "t.txt lists a.jpg"),
    "no objects": (
        BOXES, lambda root: [one.write_text("") for one in root.glob("labels/*/*.txt")],
        "has no annotated object",
    ),
    "no object in a part": (
        BOXES, lambda root: [one.write_text("") for one in root.glob("labels/val/*.txt")],
        "2 images for val have no object",
    ),
    "XML cut off": (XML, cut(VOC), "c.xml is cut off or not XML: "),
    "entities": (XML, lambda root: write(root / VOC, BOMB), "c.xml has a document type"),
    "XML without image": (XML, removed("JPEGImages/c.jpg"), "1 of 8 XML files .* is .*c.xml"),
    "XML of two images": (XML, lambda root: [changed(VOC, "c.jpg", "c.bmp")(root),
                                             image(root / "JPEGImages/c.png")], "may be of any of"),
    "box without xmin": (
        XML, changed(VOC, "<xmin>11</xmin>", ""), "c.xml must have a number as xmin of square, got"
    ),
    "box backwards": (XML, changed(VOC, "<xmin>11<", "<xmin>50<"), "must have xmin <= xmax"),
    "box outside": (XML, changed(VOC, "<xmin>11</xmin><ymin>7</ymin><xmax>34<",
                                 "<xmin>211</xmin><ymin>7</ymin><xmax>234<"),
                    r"c.xml: annotation 1 must have a bbox in its image of 96x64 pixels"),
    "object without name": (XML, changed(VOC, "<name>square</name>", ""), "object without a name"),
    "XML of another size": (XML, changed(VOC, "96", "97"), r"96x64 pixels, its .* 97x64 \(.*c.x"),
    "one image in both": (
        XML, lambda root: write(root / "ImageSets/Main/val.txt", "g\nc"), "val.txt lists c, which"
    ),
    "map missing its name": (MAPS, changed("classes.txt", "square\ntall", "square"),
                             r"masks/.\.png has the value 2, but there are 1 names"),
    "map of another size": (MAPS, lambda root: Image.new("L", (5, 9)).save(root / PNG),
                            "c.png is 5x9 pixels, its image 96x64"),
    "map of colours": (MAPS, lambda root: image(root / PNG), "must have one channel of whole num"),
    "map as JPEG": (
        MAPS, lambda root: [(root / PNG).unlink(), image(root / "masks/c.jpg")], "must be PNG, BMP"
    ),
    "two maps": (
        MAPS, lambda root: label_map(root / "labels/c.png"), "c.jpg may have any of the label maps"
    ),
    "value 300": (MAPS, lambda root: Image.fromarray(np.full(SIZE[::-1], 300, np.uint16)).save(
        root / PNG), "labels must be 0 to 254, or 255 for none, got 300 in .*c.png"),
    "names of another form": (MAPS, lambda root: [removed("classes.txt")(root), write(
        root / "_classes.csv", "Pixel Value, Class\n1, a")], "a value, from 0 on, and a name"),
    "one name twice": (MAPS, lambda root: image(root / "images/c.png"), "of one name, but .*c.jpg"),
    "maps of 255": (
        MAPS,
        lambda root: [Image.fromarray(np.full(SIZE[::-1], 255, np.uint8)).save(one)
                      for one in root.glob("masks/*")] and removed("classes.txt")(root),
        "masks/..png and all other label maps hold 255 alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_bad_folder_ends_in_one_sentence(tmp_path, name):
    layout, change, words = CASES[name]
    layout(tmp_path / "data")
    if change is not None:
        change(tmp_path / "data")
    with pytest.raises(UsageError, match=words) as raised:
        prepare(tmp_path / "data", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layout", "options", "words"),
    [
        (BOXES, {"task": "instances"}, "needs a mask for each object, but 13 of 13 are boxes only"),
        (XML, {"task": "semantic"}, "needs a mask for each object, but 13 of 13 are boxes only"),
        (MAPS, {"task": "boxes"}, "label maps, which have none: only semantic is possible"),
        (SINGLE, {"task": "box"}, "task must be one of instances, boxes, semantic, got 'box'"),
        (SINGLE, {"validation": 1.0}, "a share between 0 and 1, got 1"),
        (SINGLE, {"out": "data"}, "must be another folder"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, layout, options, words):
    layout(tmp_path / "data")
    out = tmp_path / options.pop("out", "out")
    with pytest.raises(UsageError, match=words):
        prepare(tmp_path / "data", out, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="is not there"):
        prepare(tmp_path / "data", tmp_path / "out")


def test_an_archive(tmp_path):
    SINGLE(tmp_path / "data")
    archive = tmp_path / "data/export.zip"
    archive.write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"export\.zip must be a folder, .*: unpack an archive"):
        prepare(archive, tmp_path / "out")
