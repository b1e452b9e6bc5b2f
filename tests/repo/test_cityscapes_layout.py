"""The digits as Cityscapes is laid out: files, labels, and what MMDetection makes of them.

That its own evaluation scores the truth with 100 is tested with both frameworks.
"""

import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from cityscapesscripts.helpers.labels import id2label, name2label, trainId2label
from conftest import load_tool
from digit_files import SMALL, contents
from PIL import Image

from elsa_core.runtime.errors import UsageError
from examples.digits import cityscapes_layout as layout
from examples.digits.dataset import make_dataset
from examples.digits.layouts import LAYOUTS, MODULES, make_layout

main = load_tool("make_digits").main
SMALL = {**SMALL, "train": 3, "val": 2}
PARTS = {"train": ("training", 8), "val": ("validation", 4)}


def read(path):
    with Image.open(path) as file:
        return np.array(file)


def in_order(folder, pattern):
    """Images or maps of a part, in the order of their numbers."""
    return sorted(folder.glob(pattern), key=lambda path: path.name.split("_", 1)[1])


def maps(root, part, kind):
    return in_order(root / "gtFine" / part, f"*/*_gtFine_{kind}.png")


def test_every_image_has_all_its_files(cityscapes):
    names = {"leftImg8bit", "gtFine", "annotations", "meta.json"}
    assert {path.name for path in cityscapes.iterdir()} == names
    for part, (_, count) in PARTS.items():
        images = list((cityscapes / "leftImg8bit" / part).glob("*/*"))
        stems = {str(path.relative_to(cityscapes / "leftImg8bit"))[:-16] for path in images}
        assert len(stems) == count and all(p.name.endswith("_leftImg8bit.png") for p in images)
        ends = ("polygons.json", *(f"{name}.png" for name in layout.MAPS))
        truth = (cityscapes / "gtFine" / part).glob("*/*")
        found = {str(path.relative_to(cityscapes / "gtFine")) for path in truth}
        assert found == {f"{stem}_gtFine_{end}" for stem in stems for end in ends}
    cities = {path.name for path in (cityscapes / "leftImg8bit/train").iterdir()}
    assert cities == set(layout.CITIES["train"])


def test_images_are_pairs_of_the_standard_ones(cityscapes, digits):
    for part, (name, count) in PARTS.items():
        files = sorted((digits / "images" / name).iterdir())
        wide = in_order(cityscapes / "leftImg8bit" / part, "*/*.png")
        assert len(wide) == count
        for i, path in enumerate(wide):
            halves = [cv2.imread(str(files[2 * i + side])) for side in (0, 1)]
            assert np.array_equal(cv2.imread(str(path)), np.hstack(halves))


def test_labels_are_those_of_the_standard_set(cityscapes, digits):
    """Digits pixel by pixel, but for the few that no polygon of whole pixels can tell apart."""
    ids = [name2label[name].id for name in layout.STANDS_FOR]
    background = {name2label[name].id for name in (layout.BACKGROUND, layout.FLOOR)}
    nothing = name2label[layout.NOTHING].id
    for part, (name, _) in PARTS.items():
        files = sorted((digits / "annotations" / name).glob("*.png"))
        for i, path in enumerate(maps(cityscapes, part, "labelIds")):
            standard = np.hstack([read(files[2 * i]), read(files[2 * i + 1])])
            labels = read(path)
            inside = labels != nothing
            assert (~inside[:, :2]).all() and (~inside[:, -2:]).all() and inside[:, 2:-2].all()
            wanted = np.array([0, 0, *ids])[standard]
            right = np.where(wanted > 0, labels == wanted, np.isin(labels, list(background)))
            assert right[inside].mean() > 0.999
            assert {7, 11} <= set(np.unique(labels[:, 2:-2]))


def test_maps_agree_with_each_other(cityscapes):
    train_ids = {number: label.trainId % 256 for number, label in id2label.items() if number >= 0}
    colours = {number: label.color for number, label in id2label.items() if number >= 0}
    instances = set()
    for part in PARTS:
        kinds = [maps(cityscapes, part, name) for name in layout.MAPS]
        for files in zip(*kinds, strict=True):
            instance, ids, train, colour = map(read, files)
            assert instance.shape == ids.shape == train.shape == (96, 192)
            assert np.array_equal(np.where(instance < 1000, instance, instance // 1000), ids)
            assert np.array_equal(np.vectorize(train_ids.get)(ids), train)
            wanted = [colours[value] for value in ids.ravel().tolist()]
            assert list(map(tuple, colour[..., :3].reshape(-1, 3).tolist())) == wanted
            values = np.unique(instance).tolist()
            instances |= {value // 1000 for value in values if value >= 1000}
            for label in {value // 1000 for value in values if value >= 1000}:
                mine = [value % 1000 for value in values if value // 1000 == label]
                assert mine == list(range(len(mine)))
    assert instances == {name2label[name].id for name in layout.STANDS_FOR[:8]}


def test_annotations_are_what_mmdetections_converter_makes(cityscapes, tmp_path):
    mmdet = pytest.importorskip("mmdet")
    folder = Path(mmdet.__path__[0]) / ".mim/tools/dataset_converters"
    converter = SimpleNamespace(**runpy.run_path(str(folder / "cityscapes.py")))
    for part in PARTS:
        folders = [str(cityscapes / kind / part) + "/" for kind in ("leftImg8bit", "gtFine")]
        ours = f"annotations/instancesonly_filtered_gtFine_{part}.json"
        ours = json.loads((cityscapes / ours).read_text())
        order = [image["file_name"] for image in ours["images"]]
        files = converter.collect_files(*folders)
        files.sort(key=lambda names: order.index(names[0].removeprefix(folders[0])))
        collected = converter.collect_annotations(files)
        theirs = converter.cvt_annotations(collected, tmp_path / "x.json")
        for one in theirs["annotations"]:
            one["id"] += 1  # theirs start at 0, which pycocotools takes for no match
        assert ours == json.loads(json.dumps(theirs))
        assert len(ours["annotations"]) > 5 and all(a["area"] > 0 for a in ours["annotations"])


def drawn(scene, tmp_path):
    """Label map and instance map of a scene."""
    instances = layout._write_labels(tmp_path, "x", layout._polygons(scene))
    return read(tmp_path / "x_gtFine_labelIds.png"), instances


def test_pieces_and_what_a_hole_shows_are_groups(tmp_path):
    """A bar that a frame covers: a piece on each side of the frame, and one in its hole."""
    bar, frame = np.zeros((2, 48, 96), bool)
    frame[10:30, 30:60] = True
    frame[14:26, 36:54] = False
    bar[18:22, 10:80] = True
    bar &= ~frame
    image = np.zeros((48, 96, 3), np.uint8)
    scene = layout.Scene(image, [("car", bar), ("traffic sign", frame)])
    labels, instances = drawn(scene, tmp_path)
    car, sign = name2label["car"].id, name2label["traffic sign"].id
    assert np.array_equal(labels == car, bar) and np.array_equal(labels == sign, frame)
    largest, other, through = instances[20, 20], instances[20, 70], instances[20, 45]
    assert {largest, other} == {car, car * 1000} and through == car
    assert np.count_nonzero(instances == car * 1000) == 4 * 20
    assert labels[16, 40] == name2label["building"].id and labels[47, 50] == name2label["road"].id
    # The frame's own class knows no instances; one that does numbers them.
    scene = layout.Scene(image, [("bus", bar), ("bus", frame)])
    labels, instances = drawn(scene, tmp_path)
    bus = name2label["bus"].id
    assert np.array_equal(labels == bus, bar | frame)
    assert np.array_equal(instances == bus * 1000 + 1, frame)
    assert instances[20, 45] == bus


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_reproducible_and_replaces_another_only_with_force(name, tmp_path):
    first = make_layout(name, tmp_path / "x", **SMALL)
    assert first.made and not make_layout(name, tmp_path / "x", **SMALL).made
    before = contents(tmp_path / "x")
    other = LAYOUTS[LAYOUTS.index(name) - 1]
    with pytest.raises(UsageError, match="--force replaces it"):
        make_layout(other, tmp_path / "x", **SMALL)
    assert make_layout(other, tmp_path / "x", force=True, **SMALL).made
    again = make_layout(name, tmp_path / "x", force=True, **SMALL)
    assert again[2:] == first[2:] and contents(tmp_path / "x") == before
    make_layout(name, tmp_path / "x", force=True, seed=1, **SMALL)
    other = contents(tmp_path / "x")
    pixels = [file for file in {*before, *other} if file.endswith((".jpg", ".png", ".JPEG"))]
    assert len(pixels) > 4 and all(before.get(file) != other.get(file) for file in pixels)


def test_command_says_what_it_made(tmp_path, capsys):
    out = tmp_path / "c"
    command = ["--out", str(out), "--train", "3", "--val", "2", "--size", "64"]
    assert main([*command, "--layout", "cityscapes"]) == 0
    said = capsys.readouterr()
    assert "c: wrote 3 training images with" in said.out and "as cityscapes is laid" in said.out
    assert "scenes: 100%" in said.err
    files = contents(out)
    # An odd image stands beside the first: images 1 and 2, 3 and 1.
    assert sum(name.startswith("leftImg8bit/train") for name in files) == 2
    meta = json.loads(files["meta.json"])
    assert meta["layout"] == "cityscapes" and meta["options"]["train"] == 3
    assert sorted([*meta["files"], "meta.json"]) == sorted(files)
    assert main(command) == 2
    assert "layout=cityscapes (generator version" in capsys.readouterr().err
    (out / "mine.txt").write_text("")
    assert main([*command, "--force"]) == 2
    assert "also holds files of others (mine.txt)" in capsys.readouterr().err


def test_unknown_layouts_are_refused(tmp_path):
    with pytest.raises(UsageError, match="must be one of standard, .*, panoptic, got"):
        make_layout("voc", tmp_path / "x", **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "examples.digits.cityscapes_layout")
    monkeypatch.setitem(sys.modules, "cityscapesscripts.helpers.annotation", None)
    assert main(["--layout", "cityscapes", "--out", str(tmp_path / "x")]) == 2
    assert "the Python package cityscapesscripts" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cityscapes", "imagenet"])
def test_a_broken_image_is_named(name, tmp_path):
    make_dataset(tmp_path / "source", **SMALL)
    (tmp_path / "source/images/training/000002.jpg").write_bytes(b"JPEG")
    (tmp_path / "out").mkdir()
    write_layout = importlib.import_module(MODULES[name]).write_layout
    with pytest.raises(ValueError, match="000002.jpg is no image"):
        write_layout(tmp_path / "source", tmp_path / "out", progress=False)


def test_classes_are_known_to_cityscapes():
    assert len(set(layout.STANDS_FOR)) == 10
    things = [name for name in layout.STANDS_FOR if name2label[name].hasInstances]
    assert things == list(layout.STANDS_FOR[:8])
    evaluated = [label for i, label in trainId2label.items() if i not in (255, -1)]
    assert len(evaluated) == 19 and {name2label[n] for n in layout.STANDS_FOR} <= set(evaluated)
