"""Folders in the usual layouts become the data set that was written into them."""

import json
from pathlib import Path

import fit_folders
import numpy as np
import pytest
from fit_folders import write
from PIL import Image
from pycocotools.coco import COCO

from elsa_core.data.images import read_image
from elsa_core.data.label_maps import pair_files, read_labels
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


def test_lists_of_voc_have_a_name_a_line(tmp_path, monkeypatch):
    """Names may have spaces. The source is relative; its images are found from any folder."""
    fit_folders.voc(tmp_path / "data")
    for path in [*tmp_path.rglob("g.*"), tmp_path / "data/ImageSets/Main/val.txt"]:
        if path.suffix == ".txt":
            write(path, path.read_text().replace("g\n", "my  g\n").replace("h\n", '"h"\n'))
        else:
            path.rename(path.with_stem("my  g"))
    monkeypatch.chdir(tmp_path)
    made = prepare(Path("data"), Path("out"))
    assert not made.warnings and made.train.images.is_absolute()
    assert set(objects_of(made.val, masks=False)) == set(fit_folders.VAL)


@pytest.mark.parametrize("layout", ["yolo_boxes", "voc"])
def test_boxes_are_those_of_supervision(tmp_path, layout):
    """Its masks are not compared: it draws polygons with their right and lower edge."""
    sv = pytest.importorskip("supervision")
    root = tmp_path / "data"
    fit_folders.LAYOUTS[layout](root)
    if layout == "voc":
        folders = [(root / "JPEGImages", root / "Annotations")]
        theirs = [sv.DetectionDataset.from_pascal_voc(*map(str, one)) for one in folders]
    else:
        folders = [(root / f"images/{part}", root / f"labels/{part}") for part in ("train", "val")]
        file = str(root / "data.yaml")
        theirs = [sv.DetectionDataset.from_yolo(*map(str, one), file) for one in folders]
    expected = {}
    for path, _, found in (one for part in theirs for one in part):
        boxes = found.xyxy.reshape(-1, 4).tolist()
        expected[number_of(path)] = [(x, y, right - x, down - y) for x, y, right, down in boxes]
    made = prepare(root, tmp_path / "out")
    ours = objects_of(made.train, False) | objects_of(made.val, False)
    assert ours.keys() == expected.keys()
    for number, objects in ours.items():
        assert np.allclose([one[1:] for one in objects], expected[number], atol=1e-3)


def listed(root):
    """Parts as lists of images, relative to the list and to the data set, as in CVAT's export."""
    fit_folders.yolo(root)
    names = [f"images/train/{fit_folders.name_of(n)}" for n in fit_folders.TRAIN]
    write(root / "train.txt", "\n".join([*(f"./{n}" for n in names[:3]), f"data/{names[3]}"]))
    write(root / "more.txt", "\n".join(names[4:]))
    yaml = "train: [train.txt, more.txt]\nval: images/val\nnames: [square, tall]\nnc: 2\n"
    write(root / "data.yaml", yaml)


def moved(root):
    """Roboflow's paths, which leave the folder, and its folders in another order."""
    fit_folders.yolo(root)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (root / part).mkdir(exist_ok=True)
            (root / kind / part).rename(root / part / kind)
    write(root / "data.yaml", "train: ../train/images\nval: ../val/images\nnames: [square, tall]")


def of_another_machine(root):
    fit_folders.yolo(root)
    lines = ["path: /content/data", "train: /content/data/images/train"]
    lines += [r"val: C:\data\images\val", "names: [square, tall]"]
    write(root / "data.yaml", "\n".join(lines))


def beside(root):
    """Labels beside the images, the names of the classes in a text."""
    fit_folders.yolo(root)
    (root / "data.yaml").unlink()
    for file in [*root.glob("images/*/*"), *root.glob("labels/*/*")]:
        (root / file.parent.name).mkdir(exist_ok=True)
        file.rename(root / file.parent.name / file.name)
    write(root / "classes.txt", "square\ntall\n")


def pose(root):
    """Keypoints after the boxes, which are left out."""
    fit_folders.yolo_boxes(root)
    for file in root.glob("labels/*/*"):
        lines = file.read_text().splitlines()
        write(file, "".join(f"{line} .5 .5 2 .4 .4 2\n" for line in lines))
    write(root / "data.yaml", (root / "data.yaml").read_text() + "kpt_shape: [2, 3]\n")


def odd_lines(root):
    """Blank lines, other spaces, a byte order mark, a class as a float."""
    fit_folders.yolo(root)
    for file in root.glob("labels/*/*"):
        lines = [line.replace(" ", ".0\t", 1) for line in file.read_text().splitlines()]
        file.write_text("\n\r\n".join(lines) + "\n\n", encoding="utf-8-sig")


@pytest.mark.parametrize(
    "write_variant", [listed, moved, of_another_machine, beside, pose, odd_lines]
)
def test_yolo_is_read_in_all_its_forms(tmp_path, write_variant):
    write_variant(tmp_path / "data")
    made = prepare(tmp_path / "data", tmp_path / "out")
    assert made.task == (BOXES if write_variant is pose else INSTANCES)
    train, val = (objects_of(part, made.task == INSTANCES) for part in (made.train, made.val))
    assert {**train, **val} == {n: fit_folders.objects(n) for n in range(8)}
    assert set(val) == set(fit_folders.VAL)


def test_classes_are_texts_whatever_yaml_makes_of_them(tmp_path):
    fit_folders.yolo(tmp_path / "data")
    yaml = "train: images/train\nval: images/val\nnames: [no, 007]\n"
    write(tmp_path / "data/data.yaml", yaml)
    assert prepare(tmp_path / "data", tmp_path / "out").classes == ("no", "007")


def test_boxes_where_some_have_no_mask(tmp_path):
    fit_folders.yolo(tmp_path / "data", mixed=True)
    made = prepare(tmp_path / "data", tmp_path / "out")
    assert made.task == BOXES
    assert objects_of(made.train, False)[1] == fit_folders.objects(1)
    assert prepare(tmp_path / "data", tmp_path / "out", BOXES) == made


@pytest.mark.parametrize("layout", ["yolo", "roboflow"])
def test_boxes_and_label_maps_of_masks(tmp_path, layout):
    fit_folders.LAYOUTS[layout](tmp_path / "data")
    made = prepare(tmp_path / "data", tmp_path / "boxes", BOXES)
    assert made.task == BOXES and objects_of(made.train, False)[2] == fit_folders.objects(2)
    made = prepare(tmp_path / "data", tmp_path / "maps", SEMANTIC)
    assert (made.task, made.classes) == (SEMANTIC, ("background", *fit_folders.CLASSES))
    assert labels_of(made) == {n: expected_map(n) for n in range(8)}


def labels_of(made):
    """{number of an image: label map as lists}, as both frameworks pair and read the files."""
    found = {}
    for part in (made.train, made.val):
        pairs = pair_files(str(part.images), str(part.maps))
        assert len(pairs) == part.count
        for image, labels in pairs:
            size = read_image(image).shape[:2]
            read = read_labels(labels, labels, len(made.classes), made.reduce_zero_label, size=size)
            found[number_of(image)] = read.tolist()
    return found


def expected_map(number, background=0):
    values = np.full(fit_folders.SIZE[::-1], background)
    for label, x, y, w, h in fit_folders.objects(number):
        values[y : y + h, x : x + w] = label + 1
    return values.tolist()


def roboflow_masks(root):
    for part, numbers in (("train", fit_folders.TRAIN), ("valid", fit_folders.VAL)):
        for n in numbers:
            fit_folders.image(root / part / fit_folders.name_of(n), n)
            fit_folders.label_map(root / part / f"{Path(fit_folders.name_of(n)).stem}_mask.png", n)
        write(root / part / "_classes.csv", "Pixel Value, Class\n0, background\n1, square\n2, tall")


def parts_of_maps(root):
    for part, numbers in (("train", fit_folders.TRAIN), ("val", fit_folders.VAL)):
        for n in numbers:
            fit_folders.image(root / "img_dir" / part / fit_folders.name_of(n), n)
            name = f"{Path(fit_folders.name_of(n)).stem}.png"
            fit_folders.label_map(root / "ann_dir" / part / name, n)
    write(root / "data.yaml", "names:\n  0: background\n  1: square\n  2: tall\n")


def voc_masks(root):
    """Palettes, as VOC has them, beside boxes."""
    fit_folders.voc(root)
    for n in range(8):
        path = root / "SegmentationClass" / f"{Path(fit_folders.name_of(n)).stem}.png"
        fit_folders.label_map(path, n)
        with Image.open(path) as labels:
            labels.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
            labels.save(path)
    (root / "ImageSets/Main").rename(root / "ImageSets/Segmentation")
    write(root / "labels.txt", "square\ntall")


@pytest.mark.parametrize(
    "write_maps", [fit_folders.label_maps, roboflow_masks, parts_of_maps, voc_masks]
)
def test_label_maps_are_those_of_the_source(tmp_path, write_maps):
    write_maps(tmp_path / "data")
    task = SEMANTIC if write_maps is voc_masks else None
    made = prepare(tmp_path / "data", tmp_path / "out", task)
    assert (made.task, made.classes) == (SEMANTIC, ("background", *fit_folders.CLASSES))
    assert labels_of(made) == {n: expected_map(n) for n in range(8)}
    assert all(one.is_symlink() for one in made.train.images.iterdir())
    if write_maps is not fit_folders.label_maps:
        assert {number_of(one) for one in made.val.images.iterdir()} == set(fit_folders.VAL)


@pytest.mark.parametrize(
    ("names", "values", "classes", "reduced"),
    [
        ("", {}, ("background", "class_1", "class_2"), False),
        ("void\nsquare\ntall", {}, ("void", "square", "tall"), False),
        ("void\nsquare\ntall\nfar", {}, ("void", "square", "tall", "far"), False),
        ("", {0: 255}, ("class_1", "class_2"), True),
        ("square\ntall", {0: 255}, ("square", "tall"), True),
        ("void\nsquare\ntall", {0: 255}, ("void", "square", "tall"), False),
        ("", {1: 255, 2: 255}, ("background", "class_1"), False),
        ("cell", {1: 255, 2: 255}, ("background", "cell"), False),
    ],
)
def test_values_and_names_of_label_maps(tmp_path, names, values, classes, reduced):
    root = tmp_path / "data"
    fit_folders.label_maps(root)
    (root / "classes.txt").write_text(names)
    for path in root.glob("masks/*"):
        with Image.open(path) as labels:
            found = np.array(labels)
        Image.fromarray(np.vectorize(lambda one: values.get(one, one))(found).astype("uint8")).save(
            path
        )
    made = prepare(root, tmp_path / "out")
    assert (made.classes, made.reduce_zero_label) == (classes, reduced)
    # As a model sees them: the values of the files, without the background where it is no class.
    for number, labels in labels_of(made).items():
        expected = np.array(expected_map(number))
        if 0 in values:
            expected = np.where(expected == 0, 255, expected - reduced)
        elif values:
            expected = (expected > 0).astype(int)
        assert labels == expected.tolist()


def test_lines_that_repeat_or_leave_the_image(tmp_path):
    fit_folders.yolo(tmp_path / "data")
    lines = "0 0.1 0.5 0.208 0.5\n0  0.1 0.5 0.208 0.5\n1 0.9 0.9 1.005 0.9 1.005 1 0.9 1\n"
    write(tmp_path / "data/labels/train/a.txt", lines)
    made = prepare(tmp_path / "data", tmp_path / "out")
    assert made.warnings[0].startswith("1 label files have a line twice, which counts once: ")
    right, down = fit_folders.SIZE
    expected = [(0, 0, down / 4, 0.204 * right, down / 2), (1, 0.9 * right, 57.6, 9.6, 6.4)]
    assert np.allclose(objects_of(made.train, False)[0], expected, atol=0.01)


def test_numbers_in_texts(tmp_path):
    """As Roboflow writes the boxes of polygons."""
    fit_folders.roboflow(tmp_path / "data")
    for file in (tmp_path / "data").glob("*/*.json"):
        content = json.loads(file.read_text())
        for one in content["annotations"]:
            one["bbox"][2:] = [f"{value:.4f}" for value in one["bbox"][2:]]
        write(file, content)
    made = prepare(tmp_path / "data", tmp_path / "out")
    assert objects_of(made.train, True)[3] == fit_folders.objects(3)


def test_small_objects_are_drawn_on_large_ones(tmp_path):
    fit_folders.yolo(tmp_path / "data")
    large, small = (
        "0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75",
        "0.5 0.5 0.625 0.5 0.625 0.625 0.5 0.625",
    )
    for name, lines in (("a", (large, small)), ("b", (small, large))):
        labels = [0, 1] if name == "a" else [1, 0]
        text = "\n".join(f"{label} {line}" for label, line in zip(labels, lines, strict=True))
        write(tmp_path / f"data/labels/train/{name}.txt", text)
    found = labels_of(prepare(tmp_path / "data", tmp_path / "out", SEMANTIC))
    assert found[0] == found[1]
    assert np.bincount(np.ravel(found[0])).tolist() == [96 * 64 * 3 // 4, 48 * 32 - 12 * 8, 12 * 8]
