"""Files in COCO's format: what is wrong in them is counted, by rule, with examples."""

import copy
import json

import numpy as np
import pycocotools.mask
import pytest
from data_trees import SIZE, coco_content, image

from elsa_core.data.coco import first_problem, load_coco, read_coco
from elsa_core.data.rle import compressed_counts
from elsa_core.runtime.errors import UsageError
from elsa_tools.data.annotations import validate
from elsa_tools.data.check import check_annotations

WIDTH, HEIGHT = SIZE


@pytest.fixture
def content():
    """3 images with 4 annotations of 2 categories."""
    content = coco_content(["a.jpg", "b.jpg", "c.jpg"], 2)
    extra = {**content["annotations"][1], "id": 9}
    return {**content, "annotations": [*content["annotations"], extra]}


def test_good_annotations_have_no_findings(content):
    assert validate("f", content) == [] and first_problem(content) is None


def change(**values):
    """Changes the last annotation."""
    return lambda content: content["annotations"][-1].update(values)


def change_image(**values):
    return lambda content: content["images"][0].update(values)


def change_category(**values):
    return lambda content: content["categories"][0].update(values)


def drop(key):
    return lambda content: content["annotations"][-1].pop(key)


def mask(segmentation):
    return change(segmentation=segmentation)


def rle(counts, size=(HEIGHT, WIDTH)):
    return mask({"size": list(size), "counts": counts})


TRIANGLE = [1, 1, 9, 1, 9, 9]
NINE = "annotation 9"
ERRORS = {
    "no image of that id": (change(image_id=77), "unknown-image", "of image 77"),
    "no image id": (drop("image_id"), "unknown-image", NINE),
    "no category of that id": (change(category_id=3), "unknown-category", "category 3"),
    "category id of a list": (change(category_id=[1]), "unknown-category", "[1]"),
    "annotation id twice": (change(id=1), "duplicate-annotation-id", "1"),
    "image id twice": (change_image(id=1), "duplicate-image-id", "1"),
    "category id twice": (change_category(id=2), "duplicate-category-id", "2"),
    "no annotation id": (drop("id"), "no-annotation-id", "None"),
    "category without a name": (change_category(name=""), "no-category-name", "1"),
    "file named twice with two sizes": (
        change_image(file_name="b.jpg", width=WIDTH + 1),
        "image-size",
        "b.jpg",
    ),
    "no file name": (change_image(file_name=None), "no-file-name", "image 0"),
    "image without a size": (change_image(width=0), "image-size", "image a.jpg"),
    "no box": (drop("bbox"), "box-form", "annotation 9: None"),
    "box of 3 numbers": (change(bbox=[1, 2, 3]), "box-form", "[1, 2, 3]"),
    "box of words": (change(bbox=["1", 2, 3, 4]), "box-form", "'1'"),
    "box that is not a number": (change(bbox=[1, 2, float("nan"), 4]), "box-form", "nan"),
    "box off the image": (change(bbox=[24, 2, 6, 4]), "box-off-image", "[24, 2, 6, 4]"),
    "area of a word": (change(area="80"), "area-form", "'80'"),
    "area beyond COCO's range": (change(area=2e10), "area-form", ": 20000000000.0"),
    "iscrowd of a word": (change(iscrowd="0"), "iscrowd-form", "annotation 9: '0'"),
    "ignore of a word": (change(ignore="no"), "ignore-form", "annotation 9: 'no'"),
    "annotation id of text": (change(id="a"), "mixed-annotation-ids", "annotation 'a'"),
    "image id of text": (change_image(id="0"), "mixed-image-ids", "image '0'"),
    "category id that is true": (change_category(id=True), "no-category-id", "True"),
    "category name twice": (
        change_category(name="kind 2"),
        "duplicate-category-name",
        "category 2 kind 2",
    ),
    "crowds only": (
        lambda content: [one.update(iscrowd=1) for one in content["annotations"]],
        "no-objects",
        "4 annotations",
    ),
    "empty mask": (mask([]), "no-mask", NINE),
    "mask of a word": (mask("mask"), "mask-form", NINE),
    "polygon of 2 points": (mask([[1, 1, 9, 9]]), "no-polygon", NINE),
    "polygon of 7 numbers": (mask([[*TRIANGLE, 5]]), "no-polygon", NINE),
    "polygon of words": (mask([["a"] * 6]), "polygon-form", NINE),
    "polygon of numbers in no list": (mask(TRIANGLE), "polygon-form", NINE),
    "polygon far away": (mask([[1e9, 1, 2e9, 1, 2e9, 9]]), "polygon-off-image", NINE),
    "RLE too short": (rle([10, 20]), "rle-broken", NINE),
    "RLE too long": (rle([10, 2000]), "rle-broken", NINE),
    "RLE of negative numbers": (rle([-1, 385]), "rle-form", NINE),
    "RLE cut off": (rle("c26>0000"), "rle-broken", NINE),
    "RLE of other characters": (rle("\x01\x02 é"), "rle-form", NINE),
    "RLE without counts": (mask({"size": [1]}), "rle-form", NINE),
    "RLE of another size": (rle([4, 4], (4, 2)), "rle-size", NINE),
}
WARNINGS = {
    "file named twice": (change_image(file_name="b.jpg"), "duplicate-file-name", "b.jpg"),
    "box without width": (change(bbox=[1, 2, 0, 4]), "box-without-area", "[1, 2, 0, 4]"),
    "box turned round": (change(bbox=[5, 5, -2, 4]), "box-without-area", "-2"),
    "box over the edge": (change(bbox=[20, 2, 6, 4]), "box-outside", "in 24x16"),
    "box that float32 does not hold": (change(bbox=[20, 2, 1e-6, 4]), "box-without-area", NINE),
    "box thinner than a pixel": (change(bbox=[2, 2, 0.5, 4]), "box-thin", "0.5"),
    "no area": (drop("area"), "no-area", NINE),
    "area of 0": (change(area=0), "no-area", NINE),
    "no iscrowd": (drop("iscrowd"), "no-iscrowd", NINE),
    "iscrowd null": (change(iscrowd=None), "no-iscrowd", NINE),
    "difficult": (change(ignore=1), "ignored", NINE),
    "annotation id 0": (change(id=0), "annotation-id-form", "annotation 0"),
    "polygon of 2 points beside another": (mask([[1, 1, 9, 9], TRIANGLE]), "polygon-short", NINE),
    "polygon on one point": (mask([[3, 3, 3, 3, 3, 3]]), "mask-empty", NINE),
    "RLE of nothing": (rle([WIDTH * HEIGHT]), "mask-empty", NINE),
    "unused category": (
        lambda content: content["categories"].append({"id": 3, "name": "rare"}),
        "unused-category",
        "rare",
    ),
}
FOLLOW_UPS = {
    "duplicate-image-id": {"unknown-image"},
    "mixed-image-ids": {"unknown-image"},
    "duplicate-category-id": {"unknown-category"},
    "no-category-id": {"unknown-category"},
    "image-size": {"rle-size"},
}


@pytest.mark.parametrize("name", ERRORS | WARNINGS)
def test_damage_is_found(content, name):
    spoil, rule, example = (ERRORS | WARNINGS)[name]
    level = "error" if name in ERRORS else "warning"
    spoil(content)
    found = {finding.rule: finding for finding in validate("f", content)}
    finding = found[rule]
    assert finding.level == level and finding.count == 1 and "{" not in finding.text
    assert example in " ".join(finding.examples)
    rest = {other for other in found if found[other].level == "error"} - {rule, "unused-category"}
    assert rest <= FOLLOW_UPS.get(rule, set())
    sentence = first_problem(content)  # what the checker accepts no run refuses, and vice versa
    assert (sentence is None) == (level == "warning") and "{" not in str(sentence)


def test_findings_are_counted_with_the_first_few_as_examples(content):
    for number in range(2000):
        content["annotations"].append(
            {**copy.deepcopy(content["annotations"][-1]), "id": 100 + number, "image_id": 50}
        )
    (finding,) = validate("f", content)
    assert finding.count == 2000 and finding.text.startswith("2,000 annotations belong to images")
    assert [text.split()[1] for text in finding.examples] == ["100", "101", "102"]


def test_the_tolerance_at_the_edge(content):
    change(bbox=[20, 2, 4.9, 4])(content)
    assert validate("f", content) == []
    assert [one.rule for one in validate("f", content, tolerance=0.5)] == ["box-outside"]


def test_boxes_alone_are_worth_a_warning_only(content):
    for one in content["annotations"]:
        del one["segmentation"]
    (finding,) = validate("f", content)
    assert finding.rule == "no-masks" and finding.level == "warning"


def test_number_of_categories(content):
    (finding,) = validate("f", content, categories=80)
    assert finding.text == "has 2 categories instead of 80" and finding.level == "error"


@pytest.mark.parametrize("seed", range(20))
def test_compressed_counts_are_those_of_pycocotools(seed):
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 300, 2)
    mask = (random.random((height, width)) < random.random() ** 3).astype(np.uint8)
    if seed % 2:  # long runs
        mask = np.repeat(np.repeat(mask, 23, axis=0), 9, axis=1)
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    encoded = pycocotools.mask.encode(np.asfortranarray(mask))["counts"].decode()
    assert compressed_counts(encoded) == counts


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file"),
        ("", "is empty"),
        ('{"images": [', "is cut off or not JSON"),
        (b"\xff\xfe\x00".decode("latin-1"), "is cut off or not JSON"),
        ("[]", "has no list of images"),
        ('{"images": [], "annotations": [], "categories": [3]}', "has no list of categories"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=message) as error:
        read_coco(str(file))
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("no image of that id", "annotation 9 belongs to image 77, which is not in the file"),
        ("no category of that id", "annotation 9 has category 3, which is not in the file"),
        ("annotation id twice", "annotation 1 has the id 1, which is used twice"),
        ("box of 3 numbers", "annotation 9 must have a bbox of 4 numbers, got [1, 2, 3]"),
        (
            "RLE without counts",
            "annotation 9 must have polygons or RLE with size and counts as its segmentation",
        ),
        ("box of words", "annotation 9 must have a bbox of 4 numbers, got ['1', 2, 3, 4]"),
    ],
)
def test_what_no_training_survives(content, name, sentence):
    ERRORS[name][0](content)
    assert first_problem(content) == sentence


def test_masks_are_a_matter_of_runs_that_need_them(content):
    change(segmentation=[])(content)
    assert first_problem(content, masks=True).startswith("annotation 9 must have a mask")
    assert first_problem(content, masks=False) is None
    for one in content["annotations"]:
        del one["segmentation"]
    assert first_problem(content) is None
    assert first_problem(content, masks=True).startswith("annotation 1 must have a mask")


BOX = [[2, 2, 12, 2, 12, 10, 2, 10]]
NORMAL = {
    "ids from 0": (lambda all: [one.update(id=one["id"] - 1) for one in all], "id", [1, 2, 3, 4]),
    "ids of text": (
        lambda all: [one.update(id=f"a{one['id']}") for one in all],
        "id",
        [1, 2, 3, 4],
    ),
    "ids with gaps": (lambda all: all[0].update(id=7), "id", [7, 2, 3, 9]),
    "no iscrowd": (lambda all: [one.pop("iscrowd") for one in all], "iscrowd", [0] * 4),
    "iscrowd null and true": (
        lambda all: [
            one.update(iscrowd=flag) for one, flag in zip(all, [True, None, 0, 1.0], strict=True)
        ],
        "iscrowd",
        [1, 0, 0, 1],
    ),
    "difficult": (lambda all: all[1].update(ignore=1), "iscrowd", [1, 1, 0, 0]),
    "areas": (
        lambda all: (all[0].pop("area"), all[1].update(area=None), all[2].update(area=-3)),
        "area",
        [119, 80, 80, 80],
    ),
    "areas of boxes": (
        lambda all: (
            [one.pop("segmentation") for one in all],
            all[1].update(area=0, bbox=[-5, 2, 10, 8.5]),
        ),
        "area",
        [119, 42.5, 80, 80],
    ),
    "short polygons": (
        lambda all: all[1].update(segmentation=[[5, 5], TRIANGLE, [1, 1, 9, 9]]),
        "segmentation",
        ["RLE", [TRIANGLE], BOX, BOX],
    ),
}


@pytest.mark.parametrize("spoil, key, values", NORMAL.values(), ids=NORMAL)
def test_what_is_left_open_is_written_out(content, spoil, key, values, tmp_path):
    spoil(content["annotations"])
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content), encoding="utf-8-sig")  # with a byte order mark
    found = [one.get(key) for one in load_coco(str(file))["annotations"]]
    assert ["RLE" if isinstance(one, dict) else one for one in found] == values
    assert all(
        type(one) is type(value) or key == "area"
        for one, value in zip(found[1:], values[1:], strict=True)
    )


def test_a_file_with_errors_is_not_loaded(content, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**content, "images": None}))
    with pytest.raises(UsageError, match="is not in COCO's format: it has no list of images"):
        load_coco(str(file))
    change(bbox=None)(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="a.json: annotation 9 must have a bbox of 4 numbers, got"):
        load_coco(str(file))


def test_other_formats(content):
    panoptic = {"image_id": 1, "file_name": "b.png", "segments_info": [{"id": 3}]}
    assert "panoptic format" in first_problem({**content, "annotations": [panoptic]})
    assert first_problem({key: content[key] for key in ("images", "categories")}) is None


@pytest.mark.parametrize("key", ["id", "width", "height"])
def test_an_image_entry_without(content, key):
    del content["images"][1][key]
    assert first_problem(content) == f"image b.jpg has no {key}, got None"


@pytest.fixture
def files(content, tmp_path):
    for one in content["images"]:
        image(tmp_path / "images" / one["file_name"])
    (tmp_path / "a.json").write_text(json.dumps(content))
    return str(tmp_path / "a.json"), str(tmp_path / "images")


def test_a_users_own_file_is_checked_with_its_images(files, tmp_path):
    report = check_annotations(*files, 2)
    assert not report.findings and report.opened == 3
    (tmp_path / "images/a.jpg").unlink()
    (tmp_path / "images/b.jpg").write_bytes(b"no image")
    image(tmp_path / "images/c.jpg")
    content = json.loads((tmp_path / "a.json").read_text())
    content["images"][2]["width"] = 30
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = {
        finding.where.rsplit("/", 1)[1]: finding for finding in check_annotations(*files).errors
    }
    assert set(found) == {"a.json", "b.jpg", "c.jpg"}
    assert "1 of 3 images have no file" in found["a.json"].text
    assert found["b.jpg"].text == "is no image of a known kind, or empty"
    assert found["c.jpg"].text == "is 24x16 pixels, its annotations say 30x16"
