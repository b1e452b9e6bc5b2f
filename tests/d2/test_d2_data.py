"""Data sets from the config, and what is found wrong with them before a run."""

import json
import shutil
import uuid

import pytest

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from elsa_d2 import UsageError, load_config, register_coco_datasets
from elsa_d2.data.coco import check_dataset


@pytest.fixture
def copy(digits, tmp_path):
    """A copy of the validation part that may be spoilt."""
    shutil.copy(digits / "annotations/instances_validation.json", tmp_path / "annotations.json")
    shutil.copytree(digits / "images/validation", tmp_path / "images")
    return tmp_path


def register(folder):
    # Detectron2's catalog lasts as long as the process, so every test has a name of its own.
    name = f"digits_{uuid.uuid4().hex}"
    cfg = load_config()
    entry = [name, str(folder / "annotations.json"), str(folder / "images")]
    cfg.DATASETS.REGISTER_COCO = [entry]
    register_coco_datasets(cfg)
    return name


def edit(folder, **changes):
    file = folder / "annotations.json"
    coco = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in coco.items() if value is not None}))


def mark(folder, key, number=None):
    """The key of the first annotations, or of all, becomes 1."""
    annotations = json.loads((folder / "annotations.json").read_text())["annotations"]
    changed = [{**one, key: 1} for one in annotations[:number]]
    edit(folder, annotations=changed + annotations[len(changed) :])


def test_a_registered_data_set_loads(copy):
    name = register(copy)
    check_dataset(name, num_classes=10)
    records = DatasetCatalog.get(name)
    assert len(records) == 8
    assert MetadataCatalog.get(name).thing_classes == list("0123456789")
    assert {a["category_id"] for record in records for a in record["annotations"]} <= set(range(10))


def test_registering_the_same_again_is_no_error(copy):
    name = register(copy)
    cfg = load_config()
    cfg.DATASETS.REGISTER_COCO = [[name, str(copy / "annotations.json"), str(copy / "images")]]
    register_coco_datasets(cfg)
    cfg.DATASETS.REGISTER_COCO = [[name, str(copy / "annotations.json"), str(copy)]]
    with pytest.raises(UsageError, match=f"'{name}', which is registered as another data set"):
        register_coco_datasets(cfg)


@pytest.mark.parametrize("entry", [["name", "file"], "name", [["name", "file", 3]]])
def test_entries_of_another_form(entry):
    cfg = load_config()
    cfg.DATASETS.REGISTER_COCO = [entry]
    with pytest.raises(UsageError, match=r"list of \[name, annotation file, image folder\], got"):
        register_coco_datasets(cfg)


def test_a_data_set_that_is_not_registered():
    with pytest.raises(UsageError, match="data set 'unheard_of' is not registered"):
        check_dataset("unheard_of")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: (d / "annotations.json").unlink(), "cannot be read: No such file"),
        (lambda d: (d / "annotations.json").write_text(""), "is empty"),
        (
            lambda d: (d / "annotations.json").write_bytes(
                (d / "annotations.json").read_bytes()[:-100]
            ),
            "is cut off or not JSON",
        ),
        (lambda d: (d / "annotations.json").write_text("[]"), "is not in COCO's format"),
        (lambda d: edit(d, images=None), "has no list of images"),
        (lambda d: edit(d, images=[]), "has no images"),
        (lambda d: edit(d, annotations=[]), "has no annotations"),
        (lambda d: edit(d, annotations=None), "has no list of annotations"),
        (lambda d: edit(d, categories=[]), "has no categories"),
        (lambda d: mark(d, "iscrowd"), "no annotation is an object: a box with an area that is no"),
        (lambda d: edit(d, images=[{"id": 1}]), "image 1 has no width, got None"),
        (lambda d: shutil.rmtree(d / "images"), "does not exist"),
        (
            lambda d: (d / "images/000003.jpg").unlink(),
            "lacks 1 of 8 images, the first is 000003.jpg",
        ),
    ],
)
def test_a_spoilt_data_set(copy, spoil, message):
    name = register(copy)
    spoil(copy)
    with pytest.raises(UsageError, match=message) as error:
        check_dataset(name, num_classes=10)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_test_set_may_lack_annotations(copy):
    name = register(copy)
    edit(copy, annotations=None)
    check_dataset(name, num_classes=10, annotated=False)


def test_what_detectron2s_own_reader_fails_at_is_refused_there(copy):
    name = register(copy)
    mark(copy, "ignore", 1)
    check_dataset(name)
    flags = [one["iscrowd"] for record in DatasetCatalog.get(name) for one in record["annotations"]]
    assert sum(flags) == 1
    register_coco_instances(f"{name}_2", {}, str(copy / "annotations.json"), str(copy / "images"))
    with pytest.raises(UsageError, match="ignore 1, at which Detectron2 fails: list it in DATA"):
        check_dataset(f"{name}_2")
    text = (copy / "annotations.json").read_text().replace('"ignore": 1', '"ignore": 0')
    (copy / "annotations.json").write_text(text)
    check_dataset(f"{name}_2")
    (copy / "annotations.json").write_text(text, encoding="utf-8-sig")
    check_dataset(name)
    with pytest.raises(UsageError, match="is utf-8-sig, at which Detectron2 fails: write it in"):
        check_dataset(f"{name}_2")


def test_another_format_is_left_alone():
    name = f"other_{uuid.uuid4().hex}"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(evaluator_type="lvis", json_file="no", image_root="where")
    check_dataset(name, num_classes=10)


DIGITS = list("0123456789")


def renumber(folder, number, order=1):
    """The same objects under other category ids: ``number`` gives that of a digit."""
    file = folder / "annotations.json"
    coco = json.loads(file.read_text())
    names = {one["id"]: one["name"] for one in coco["categories"]}
    for one in coco["annotations"]:
        one["category_id"] = number(int(names[one["category_id"]]))
    coco["categories"] = [{"id": number(int(n)), "name": n} for n in DIGITS[::order]]
    file.write_text(json.dumps(coco))


def named(name):
    """Boxes and class names of each image, as training, evaluation and pictures see them."""
    records = DatasetCatalog.get(name)
    names = MetadataCatalog.get(name).thing_classes
    return [
        [(one["bbox"], names[one["category_id"]]) for one in record["annotations"]]
        for record in records
    ]


@pytest.mark.parametrize(
    "number, order",
    [
        (lambda digit: digit + 1, -1),
        (lambda digit: 10 - digit, 1),
        (lambda digit: digit, 1),
        (lambda digit: 7 * (digit * 3 % 10), -1),
        (lambda digit: f"id {9 - digit}", 1),
    ],
    ids=["reversed list", "turned round", "from 0", "gaps", "text"],
)
@pytest.mark.parametrize("stored", [False, True], ids=["training part", "checkpoint"])
def test_a_part_is_mapped_by_name(copy, number, order, stored):
    (copy / "train").mkdir()
    shutil.copy(copy / "annotations.json", copy / "train")
    cfg = load_config()
    names = [f"{part}_{uuid.uuid4().hex}" for part in ("train", "val")]
    places = [str(copy / "train/annotations.json"), str(copy / "annotations.json")]
    cfg.DATASETS.REGISTER_COCO = [
        [name, place, str(copy / "images")] for name, place in zip(names, places, strict=True)
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = names[:1], names[1:]
    renumber(copy, number, order)
    classes = DIGITS[::-1] if stored else None
    register_coco_datasets(cfg, classes)
    check_dataset(names[1], num_classes=10, classes=classes or DIGITS)
    found = named(names[1])
    metadata = MetadataCatalog.get(names[1])
    assert metadata.thing_classes == (classes or DIGITS)
    assert found == named(names[0]) and sum(map(len, found)) > 10
    # What the evaluation turns predictions back by.
    assert metadata.thing_dataset_id_to_contiguous_id == {
        number(int(name)): label for label, name in enumerate(metadata.thing_classes)
    }
    register_coco_datasets(cfg, DIGITS)  # the next run of this process
    assert named(names[1]) == found and MetadataCatalog.get(names[1]).thing_classes == DIGITS


def test_the_loader_of_another_has_to_agree(copy):
    name = f"other_{uuid.uuid4().hex}"
    register_coco_instances(name, {}, str(copy / "annotations.json"), str(copy / "images"))
    check_dataset(name, classes=DIGITS)
    with pytest.raises(UsageError, match="'0' as class 0 by ascending id, where .* has '9'"):
        check_dataset(name, classes=DIGITS[::-1])


def test_a_part_with_another_class_is_refused(copy):
    name = register(copy)
    with pytest.raises(UsageError, match="no category is called 'ten': the categories are 0, 1"):
        check_dataset(name, classes=[*DIGITS[:9], "ten"])
    edit(copy, categories=[{"id": i, "name": "digit"} for i in range(1, 11)])
    with pytest.raises(UsageError, match="category 2 has the name .digit., which is used twice"):
        check_dataset(name)


def test_number_of_classes(copy):
    with pytest.raises(UsageError, match="has 10 classes, but .*NUM_CLASSES is 80"):
        check_dataset(register(copy), num_classes=80)
