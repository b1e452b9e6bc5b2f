"""Where data sets are looked for, and links to them: nothing of the user's ever changes."""

import os

import pytest
from data_trees import WRITERS, coco

from elsa_core.runtime.errors import UsageError
from elsa_tools.data.layout import DETECTRON2, FRAMEWORKS, LAYOUTS, OPENMMLAB
from elsa_tools.data.places import IN_THE_WAY, MADE, THERE, distinct, link, places


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def source(tmp_path):
    coco(tmp_path / "store/coco17")
    return tmp_path / "store/coco17"


def folders(name, *arguments):
    return {place.folder: place.frameworks for place in places(LAYOUTS[name], *arguments)}


def test_the_places_are_the_frameworks_own(monkeypatch):
    assert folders("coco") == {"datasets/coco": (DETECTRON2,), "data/coco": (OPENMMLAB,)}
    assert list(folders("ade20k")) == [
        "datasets/ADEChallengeData2016",
        "data/ade/ADEChallengeData2016",
    ]
    assert list(folders("cityscapes")) == ["datasets/cityscapes", "data/cityscapes"]
    assert folders("imagenet") == {"data/imagenet": (OPENMMLAB,)}
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/sets")
    assert os.path.expanduser("~/sets/coco") in folders("coco")


def test_one_folder_for_both(monkeypatch):
    assert folders("coco", "here") == {"here/coco": FRAMEWORKS}
    assert list(folders("ade20k", "here")) == [
        "here/ADEChallengeData2016",
        "here/ade/ADEChallengeData2016",
    ]
    monkeypatch.setenv("DETECTRON2_DATASETS", "data")
    assert folders("coco") == {"data/coco": FRAMEWORKS}


def test_the_frameworks_look_there():
    """The paths in their own configs and catalogs."""
    from detectron2.data import MetadataCatalog
    from mmengine.config import Config
    from mmengine.utils import get_installed_path

    assert MetadataCatalog.get("coco_2017_train").image_root == "datasets/coco/train2017"
    ade20k = MetadataCatalog.get("ade20k_sem_seg_train").sem_seg_root
    assert ade20k == "datasets/ADEChallengeData2016/annotations_detectron2/training"
    cityscapes = MetadataCatalog.get("cityscapes_fine_sem_seg_val").gt_dir
    assert cityscapes == "datasets/cityscapes/gtFine/val/"
    for toolbox, config, name in (
        ("mmdet", "coco_instance.py", "coco"),
        ("mmdet", "cityscapes_instance.py", "cityscapes"),
        ("mmseg", "ade20k.py", "ade20k"),
        ("mmseg", "cityscapes.py", "cityscapes"),
        ("mmpretrain", "imagenet_bs64_swin_224.py", "imagenet"),
    ):
        path = f"{get_installed_path(toolbox)}/.mim/configs/_base_/datasets/{config}"
        dataset = Config.fromfile(path).train_dataloader.dataset
        dataset = dataset.get("dataset", dataset)
        (place,) = places(LAYOUTS[name], None, (OPENMMLAB,))
        assert os.path.normpath(dataset.data_root) == place.folder
        known = {item.pattern for item in LAYOUTS[name].items((OPENMMLAB,))}
        prefix = dataset.get("data_prefix") or {"train": dataset.get("split")}
        for path in filter(None, [*prefix.values(), dataset.get("ann_file")]):
            assert any(one.startswith(path.rstrip("/")) for one in known), path


def snapshot(root):
    return {
        path: (path.is_symlink(), path.lstat().st_mtime_ns, path.lstat().st_ino)
        for path in sorted(root.rglob("*"))
    }


def test_links_are_made_once(source, tmp_path):
    before = snapshot(source)
    made = link(LAYOUTS["coco"], str(source))
    assert [one.status for one in made] == [MADE, MADE]
    for one in ("datasets/coco", "data/coco"):
        assert os.readlink(one) == str(source)
    after = snapshot(tmp_path)
    again = link(LAYOUTS["coco"], "store/coco17/")
    assert [one.status for one in again] == [THERE, THERE]
    assert snapshot(tmp_path) == after and snapshot(source) == before


def test_a_dry_run_makes_nothing(source, tmp_path):
    before = snapshot(tmp_path)
    assert [one.status for one in link(LAYOUTS["coco"], str(source), dry_run=True)] == [MADE] * 2
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", WRITERS)
def test_each_data_set_can_be_linked(tmp_path, name):
    WRITERS[name](tmp_path / "store")
    made = link(LAYOUTS[name], "store", "one/folder")
    assert all(os.path.samefile(one.path, "store") for one in made)
    (one,) = distinct(places(LAYOUTS[name], "one/folder"))
    assert set(one.frameworks) == set(LAYOUTS[name].places)
    assert {one.path for one in made} == set(folders(name, "one/folder"))


@pytest.mark.parametrize(
    "block, what",
    [
        (lambda path: path.mkdir(), "is a folder, which stays"),
        (lambda path: path.write_text("mine"), "is a file, which stays"),
        (lambda path: path.symlink_to(path.parents[1]), "is a link to "),
        (lambda path: path.symlink_to("gone"), "is a link to gone, which does not exist"),
    ],
)
def test_what_is_in_the_way_stays(source, tmp_path, block, what):
    (tmp_path / "data").mkdir()
    block(tmp_path / "data/coco")
    before = snapshot(tmp_path)
    links = link(LAYOUTS["coco"], str(source))
    assert [one.status for one in links] == [MADE, IN_THE_WAY]
    assert what in str(links[1])
    assert snapshot(tmp_path) == before  # not the other link either


def test_a_data_set_that_is_in_its_place_needs_no_link(tmp_path):
    coco(tmp_path / "data/coco")
    links = link(LAYOUTS["coco"], "data/coco")
    assert [one.status for one in links] == [MADE, THERE]
    assert os.readlink("datasets/coco") == str(tmp_path / "data/coco")


@pytest.mark.parametrize(
    "folder, message",
    [
        ("nowhere", "--from nowhere is not a folder|--from .*/nowhere is not a folder"),
        ("store", "must be the folder of COCO 2017, but has none of train2017, val2017"),
        ("outer", "; is it .*/outer/coco?"),
    ],
)
def test_sources_that_are_none(source, tmp_path, folder, message):
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer/coco").symlink_to(source)
    with pytest.raises(UsageError, match=message):
        link(LAYOUTS["coco"], folder)
    assert not (tmp_path / "data").exists()


def test_a_link_into_the_data_set_itself(source, tmp_path):
    with pytest.raises(UsageError, match="would be a link inside the data set to itself"):
        link(LAYOUTS["coco"], str(source), str(source))
    assert "coco" not in os.listdir(source)


def test_a_link_that_cannot_be_made(source, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UsageError, match="data/coco cannot be made: "):
        link(LAYOUTS["coco"], str(source), frameworks=(OPENMMLAB,))
