"""Class names in OpenMMLab: labels by name, one order for checkpoint, config and annotations."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmdet")

from mm_tiny import CONFIGS, options
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from elsa_core.runtime.errors import UsageError
from elsa_mm import classes

DIGITS = list("0123456789")


@pytest.fixture
def copy(digits, tmp_path):
    shutil.copytree(digits / "annotations", tmp_path / "annotations")
    (tmp_path / "images").symlink_to(digits / "images")
    return tmp_path


def renumber(root, number, order=1, part="validation"):
    """The same objects under other category ids: ``number`` gives that of a digit."""
    file = root / f"annotations/instances_{part}.json"
    coco = json.loads(file.read_text())
    names = {one["id"]: one["name"] for one in coco["categories"]}
    for one in coco["annotations"]:
        one["category_id"] = number(int(names[one["category_id"]]))
    coco["categories"] = [{"id": number(int(n)), "name": n} for n in DIGITS[::order]]
    file.write_text(json.dumps(coco))


def config(root, kind="CocoDataset", names=DIGITS, val=None):
    """Of MMDetection's own data sets, as users have them."""
    cfg = Config.fromfile(CONFIGS["mmdet"])
    for part in ("train", "val", "test"):
        dataset = cfg[f"{part}_dataloader"].dataset
        dataset.update(type=kind, data_root=str(root), pipeline=[])
        dataset.metainfo.classes = tuple(val if val and part != "train" else names)
    return cfg


def build(cfg, part="val"):
    with DefaultScope.overwrite_default_scope("mmdet"):
        return DATASETS.build(cfg[f"{part}_dataloader"].dataset)


def named(dataset):
    """Boxes and class names of each image, as a checkpoint and pictures name them."""
    names = dataset.metainfo["classes"]
    return [
        [(one["bbox"], names[one["bbox_label"]]) for one in dataset.get_data_info(i)["instances"]]
        for i in range(len(dataset))
    ]


def said(root):
    """What the file itself says."""
    coco = json.loads((root / "annotations/instances_validation.json").read_text())
    names = {one["id"]: one["name"] for one in coco["categories"]}
    objects = {image["id"]: [] for image in coco["images"]}
    for one in coco["annotations"]:
        x, y, width, height = one["bbox"]
        objects[one["image_id"]].append(([x, y, x + width, y + height], names[one["category_id"]]))
    return list(objects.values())


@pytest.mark.parametrize(
    "number, order",
    [
        (lambda digit: digit + 1, 1),
        (lambda digit: digit + 1, -1),
        (lambda digit: 10 - digit, 1),
        (lambda digit: digit, -1),
        (lambda digit: 7 * (digit * 3 % 10), 1),
        (lambda digit: f"id {9 - digit}", 1),
    ],
    ids=["as it is", "reversed list", "turned round", "from 0", "gaps", "text"],
)
@pytest.mark.parametrize("names", [DIGITS, DIGITS[::-1]], ids=["ascending", "reversed classes"])
def test_labels_are_called_as_in_the_file(copy, number, order, names):
    renumber(copy, number, order)
    cfg = config(copy, names=names)
    (note, *_) = classes.settle(cfg, ["train", "val"])
    assert "elsa_mm.coco.CocoDataset in place of MMDetection's CocoDataset" in note
    dataset = build(cfg)
    assert dataset.metainfo["classes"] == tuple(names)
    assert named(dataset) == said(copy) and sum(map(len, said(copy))) > 10


def test_a_part_and_an_evaluation_get_the_order_of_the_model(copy):
    cfg = config(copy, "mmdet.CocoDataset", val=DIGITS[::-1])
    notes = classes.settle(cfg, ["train", "val"])
    assert "the val data is mapped by class names: class 0 is '0', not '9'" in notes[-1]
    val = cfg.val_dataloader.dataset.metainfo
    assert val.classes == tuple(DIGITS)
    assert val.palette == cfg.train_dataloader.dataset.metainfo.palette[::-1]
    stored = [*DIGITS[1:], "0"]
    notes = classes.settle(cfg, ["test"], stored)
    dataset = build(cfg, "test")
    assert dataset.metainfo["classes"] == tuple(stored) and named(dataset) == said(copy)


def test_classes_of_a_file_that_are_none_of_the_models_are_left_out_and_said(copy, monkeypatch):
    lines = []
    monkeypatch.setattr("elsa_mm.coco.print_log", lambda text, *_, **__: lines.append(text))
    cfg = config(copy, names=DIGITS[:3])
    classes.settle(cfg, ["val"])
    found = named(build(cfg))
    assert found == [[one for one in image if one[1] in DIGITS[:3]] for image in said(copy)]
    assert any("no class are left out: 3 (" in line for line in lines)


def test_a_class_that_the_file_lacks_is_refused(copy):
    cfg = config(copy, names=[*DIGITS[:9], "ten"])
    classes.settle(cfg, ["val"])
    with pytest.raises(UsageError, match="validation.json: no category is called 'ten'"):
        build(cfg)


@pytest.mark.parametrize("scope", ["mmdet", "mmseg", "mmpretrain"])
def test_one_class_needs_its_comma(scope):
    dataset = dict(type="Any", metainfo=dict(classes=("cat")))
    cfg = Config(dict(default_scope=scope, val_dataloader=dict(dataset=dict(dataset=dataset))))
    with pytest.raises(UsageError, match=r"metainfo.classes .* the text 'cat': .* \('cat',\) with"):
        classes.settle(cfg, ["val"])


def runner(scope="mmseg", **parts):
    """What `check` looks at: loops with data sets."""
    loops = {
        f"{part}_loop": SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
        for part, dataset in parts.items()
    }
    return SimpleNamespace(cfg={"default_scope": scope}, **loops)


def data(names, **more):
    return SimpleNamespace(metainfo={"classes": names}, **more)


@pytest.mark.parametrize(
    "parts, stored, message",
    [
        ([data(["a", "b"]), data(["a", "b"])], ["a", "b"], None),
        ([data(["a", "b"]), data(["b", "a"])], None, "'a' in the train data and 'b' in the val"),
        ([data(["a", "b"])], ["a", "c"], "class 1 is 'c' in the checkpoint x.pth and 'b' in the"),
        ([data(["a", "b"])], ["a"], None),  # the number of classes is another check's
        (
            [data(["b", "a"], folder_to_idx={"a": 0, "b": 1})],
            None,
            "class 0 of the train data is 'b', its folder is 'a'",
        ),
        (
            [data("xy", folder_to_idx=dict(a=0, b=1)), data("xy", folder_to_idx=dict(a=0, c=1))],
            None,
            "class 1 is the folder 'b' of the training data and 'c' of the val data",
        ),
    ],
)
def test_labels_that_stand_for_two_classes_are_refused(parts, stored, message):
    for dataset in parts:
        dataset.metainfo["classes"] = list(dataset.metainfo["classes"])
    built = runner(**dict(zip(("train", "val"), parts, strict=False)))
    names = ["train", "val"][: len(parts)]
    if message is None:
        classes.check(built, names, stored, "x.pth")
        return
    with pytest.raises(UsageError, match=message):
        classes.check(built, names, stored, "x.pth")


def test_data_sets_that_number_as_mmdetection_does_have_to_agree(copy):
    renumber(copy, lambda digit: digit + 1, -1)
    built = runner("mmdet", val=build(config(copy)))
    with pytest.raises(UsageError, match="category '9' of .* for class '0': CocoDataset goes by"):
        classes.check(built, ["val"])


@pytest.mark.parametrize("framework", CONFIGS)
def test_a_checkpoint_of_other_classes_is_refused(refusal, digits, tmp_path, framework):
    from elsa_tools.predict import load_inferencer

    names = DIGITS if framework == "mmdet" else ["background", *DIGITS]
    state = load_inferencer(str(CONFIGS[framework]), None, device="cpu").model.state_dict()
    meta = {"dataset_meta": {"classes": [*names[:-2], "a", "b"]}}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "other.pth")
    arguments = [CONFIGS[framework], tmp_path / "other.pth", *options(framework, digits)]
    sentence = refusal("test", *arguments)
    assert f"class {len(names) - 2} is 'a' in the checkpoint" in sentence
    assert "'8' in the test data" in sentence
