"""Data sets against the official layouts: whole ones, and ones with every kind of damage."""

import json
import re
import shutil

import pytest
from data_trees import WRITERS, image, labels, shrunk
from PIL import Image

from elsa_tools.data.check import check_folder
from elsa_tools.data.derive import derive
from elsa_tools.data.layout import DETECTRON2, FRAMEWORKS, LAYOUTS, OPENMMLAB
from elsa_tools.data.report import sources, tree


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each data set with its derived files, for tests to copy."""
    root = tmp_path_factory.mktemp("whole")
    for name, write in WRITERS.items():
        write(root / name)
    derive("ade20k", str(root / "ade20k"))
    derive("cityscapes", str(root / "cityscapes"))
    return root


@pytest.fixture
def tree_of(whole, tmp_path):
    def copy(name):
        shutil.copytree(whole / name, tmp_path / name)
        return tmp_path / name

    return copy


def check(name, folder, frameworks=FRAMEWORKS, **options):
    return check_folder(shrunk(name), str(folder), frameworks, **options)


@pytest.mark.parametrize("name", WRITERS)
def test_a_whole_data_set_is_complete(whole, name):
    report = check(name, whole / name)
    few_kinds = ["unused-category"] * 2 if name == "cityscapes" else []
    assert [finding.rule for finding in report.findings] == few_kinds
    items = shrunk(name).items()
    assert [row.status for row in report.rows] == ["ok"] * len(items)
    assert [row.what for row in report.rows] == [item.pattern for item in items]
    readable = [part for part in shrunk(name).parts if not part.suffix.endswith(".json")]
    assert report.opened == sum(part.count for part in readable)


@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_folder_lacks_everything(tmp_path, name):
    report = check(name, tmp_path)
    assert {row.status for row in report.rows} == {"missing"}
    assert len(report.errors) == len(shrunk(name).items())
    for error in report.errors:
        assert "does not exist" in error.text
        assert "it comes from" in error.text or "derive" in error.text


def test_the_official_counts():
    """Of COCO 2017, ADE20K, Cityscapes and ImageNet-1K."""
    counts = {(name, part.folder): part.count for name in LAYOUTS for part in LAYOUTS[name].parts}
    assert counts["coco", "train2017"] == 118_287 and counts["coco", "val2017"] == 5_000
    assert counts["ade20k", "images/training"] == 20_210
    assert counts["ade20k", "annotations/validation"] == 2_000
    assert counts["cityscapes", "leftImg8bit/train"] == 2_975
    assert counts["cityscapes", "gtFine/val"] == 500
    assert counts["imagenet", "train"] == 1_281_167 and counts["imagenet", "val"] == 50_000


@pytest.mark.parametrize("name", LAYOUTS)
def test_tree_and_sources_name_everything(name):
    layout = LAYOUTS[name]
    text = tree(layout, FRAMEWORKS) + sources(layout)
    for item in layout.items():
        assert item.pattern in text and f"{item.count:,}" in text
        assert (item.archive in layout.archives) != bool(item.derive)
    for archive, where in layout.archives.items():
        assert archive in text and where in text


def test_each_framework_needs_its_own_derived_files(tree_of):
    ade20k, cityscapes = tree_of("ade20k"), tree_of("cityscapes")
    shutil.rmtree(ade20k / "annotations_detectron2")
    shutil.rmtree(cityscapes / "annotations")
    for name, folder, needy, other in (
        ("ade20k", ade20k, DETECTRON2, OPENMMLAB),
        ("cityscapes", cityscapes, OPENMMLAB, DETECTRON2),
    ):
        assert not check(name, folder, (other,)).errors
        errors = check(name, folder, (needy,)).errors
        assert len(errors) == 2
        command = f"python tools/prepare_data.py derive {name}"
        assert all(command in error.text for error in errors)


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def without_images(root):
    for file in sorted((root / "train2017").iterdir()):
        file.unlink()


def unsorted(root):
    for file in sorted(root.glob("val/*/*.JPEG")):
        file.rename(root / "val" / file.name)
    for folder in root.glob("val/n*"):
        if folder.is_dir():
            folder.rmdir()


def one_class_less(root):
    shutil.rmtree(root / "train/n01443537")


def swap_classes(root):
    (root / "train/n01443537/n01443537_1.JPEG").rename(root / "train/n01440764/x.JPEG")


def rename_labels(root):
    folder = root / "annotations/training"
    (folder / "ADE_training_00000001.png").rename(folder / "ADE_training_00000003.png")


ADE = "annotations/training/ADE_training_00000001.png"
CITY = "gtFine/val/lindau/lindau_000000_000019_gtFine_labelTrainIds.png"
COCO_IMAGE = "train2017/000000000007.jpg"
DAMAGES = {
    # name: data set, damage, rule, place, text
    "image missing": (
        "coco",
        lambda root: (root / COCO_IMAGE).unlink(),
        "incomplete",
        "train2017",
        "has 1 of 2 files .*it comes from train2017.zip",
    ),
    "image of the annotations missing": (
        "coco",
        lambda root: (root / COCO_IMAGE).rename(root / "train2017/000000000008.jpg"),
        "missing-image-file",
        "annotations/instances_train2017.json",
        "1 of 2 images have no file in .*train2017 .first: 000000000007.jpg",
    ),
    "no image left": ("coco", without_images, "missing", "train2017", "has 0 of 2 files"),
    "image too many": (
        "coco",
        lambda root: image(root / "val2017/other.jpg"),
        "too-many",
        "val2017",
        "has 3 files .* instead of 2",
    ),
    "image cut off": (
        "coco",
        lambda root: cut(root / COCO_IMAGE),
        "damaged-file",
        COCO_IMAGE,
        "[Tt]runcated",
    ),
    "image that is none": (
        "imagenet",
        lambda root: (root / "val/n01440764/n01440764_1.JPEG").write_bytes(b"<html>"),
        "damaged-file",
        "val/n01440764/n01440764_1.JPEG",
        "is no image of a known kind",
    ),
    "empty image": (
        "cityscapes",
        lambda root: next(root.glob("leftImg8bit/train/*/*")).write_bytes(b""),
        "damaged-file",
        "_leftImg8bit.png",
        "is no image of a known kind, or empty",
    ),
    "JSON missing": (
        "coco",
        lambda root: (root / "annotations/instances_val2017.json").unlink(),
        "missing",
        "annotations/instances_val2017.json",
        "does not exist, it comes from annotations_trainval2017.zip",
    ),
    "JSON cut off": (
        "coco",
        lambda root: cut(root / "annotations/instances_val2017.json"),
        "unreadable",
        "annotations/instances_val2017.json",
        "is cut off or not JSON",
    ),
    "label too high": (
        "ade20k",
        lambda root: labels(root / ADE, (0, 151)),
        "damaged-file",
        ADE,
        r"has the value 151, allowed are 0\.\.150",
    ),
    "label between train ids and 255": (
        "cityscapes",
        lambda root: labels(root / CITY, (0, 19)),
        "damaged-file",
        CITY,
        r"has the value 19, allowed are 0\.\.18, 255",
    ),
    "label map in colours": (
        "ade20k",
        lambda root: image(root / ADE),
        "damaged-file",
        ADE,
        "must have one channel",
    ),
    "label map of another size": (
        "ade20k",
        lambda root: Image.new("L", (7, 5)).save(root / ADE),
        "damaged-file",
        ADE,
        "is 7x5 pixels, its image 24x16",
    ),
    "label map of another name": (
        "ade20k",
        rename_labels,
        "unpaired",
        "annotations/training",
        "lacks 1 files .*first: ADE_training_00000001.png",
    ),
    "train ids missing": (
        "cityscapes",
        lambda root: (root / CITY).unlink(),
        "incomplete",
        "gtFine/val",
        "has 1 of 2 files .*make it with: python tools/prepare_data.py derive cityscapes",
    ),
    "class folder missing": (
        "imagenet",
        one_class_less,
        "subfolders",
        "train",
        "has 1 subfolders instead of 2",
    ),
    "images in another class": (
        "imagenet",
        swap_classes,
        "files-in-subfolder",
        "train",
        "2 subfolders do not have 2 files each .first: n01440764 3, n01443537 1",
    ),
    "no class folders": ("imagenet", unsorted, "missing", "val", "has its files in no subfolders"),
}


@pytest.mark.parametrize("name, spoil, rule, place, text", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_named(tree_of, name, spoil, rule, place, text):
    folder = tree_of(name)
    spoil(folder)
    report = check(name, folder)
    found = [one for one in report.findings if one.rule == rule and one.where.endswith(place)]
    (finding,) = found
    assert finding.where.startswith(str(folder))
    assert re.search(text, str(finding)) and str(finding) in report.text()
    assert (finding.level == "warning") == (rule == "too-many") == (not report.errors)
    if rule not in ("too-many", "unpaired"):
        assert any(row.status != "ok" for row in report.rows)


def test_the_sample_is_random_but_seeded(tree_of):
    folder = tree_of("imagenet")
    for file in folder.glob("train/*/*_1.JPEG"):
        file.write_bytes(b"")
    found = [
        sorted(finding.where for finding in check("imagenet", folder, sample=1, seed=seed).errors)
        for seed in (*range(12), 0)
    ]
    assert found[0] == found[-1] and len({str(one) for one in found}) > 1
    assert all(len(one) <= 1 for one in found)
    assert check("imagenet", folder, sample=0).opened == 0
    assert len(check("imagenet", folder, sample=None).errors) == 2


def test_hidden_files_do_not_count(tree_of):
    folder = tree_of("coco")
    (folder / "train2017/._000000000007.jpg").write_bytes(b"")
    assert check("coco", folder).findings == []


def test_many_damaged_files_do_not_drown_the_rest(tree_of):
    folder = tree_of("imagenet")
    for number in range(30):
        (folder / f"train/n01440764/x_{number}.JPEG").write_bytes(b"")
    report = check("imagenet", folder)
    text = report.text()
    assert text.count("damaged-file") == 1 and "and 10 more of the kind damaged-file" in text
    assert text.count("is no image of a known kind") == 20
    assert "has 34 files *.JPEG instead of 4" in text
    assert sum(one["rule"] == "damaged-file" for one in report.record()["findings"]) == 30


def test_the_report_for_programs(tree_of):
    folder = tree_of("ade20k")
    labels(folder / ADE, (200,))
    record = json.loads(json.dumps(check("ade20k", folder).record()))
    assert record["folder"] == str(folder) and record["complete"] is False
    assert record["frameworks"] == list(FRAMEWORKS) and record["opened"] == 12
    (finding,) = record["findings"]
    assert finding["rule"] == "damaged-file" and finding["where"].endswith(ADE)
    by_name = {part["what"]: part for part in record["parts"]}
    assert by_name["annotations/training/*.png"]["status"] == "damaged"
    assert by_name["images/training/*.jpg"] == {
        "what": "images/training/*.jpg",
        "found": 2,
        "expected": 2,
        "status": "ok",
    }
