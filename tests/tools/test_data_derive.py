"""Files that downloads lack: what the frameworks' own converters make, whole or not there."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from data_trees import ade20k, cityscapes
from mmengine.utils import get_installed_path
from PIL import Image

from elsa_core.runtime.errors import UsageError
from elsa_tools.data import derive as module
from elsa_tools.data.derive import derive

POLYGONS = "gtFine/train/aachen/aachen_000000_000019_gtFine_polygons.json"
IDS = "gtFine/val/lindau/lindau_000001_000019_gtFine_instanceIds.png"


@pytest.fixture
def folder(tmp_path):
    cityscapes(tmp_path / "cityscapes")
    return tmp_path / "cityscapes"


def read(path):
    return np.array(Image.open(path))


def converter(toolbox):
    """A toolbox's own tools/dataset_converters/cityscapes.py."""
    path = f"{get_installed_path(toolbox)}/.mim/tools/dataset_converters/cityscapes.py"
    spec = importlib.util.spec_from_file_location(f"{toolbox}_cityscapes", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_train_ids_are_those_of_mmsegmentation(folder, capfd):
    assert derive("cityscapes", str(folder))["labelTrainIds"] == 4
    convert = converter("mmseg").convert_json_to_label
    for file in sorted(folder.rglob("*_gtFine_labelTrainIds.png")):
        ours = file.read_bytes()
        assert set(np.unique(read(file))) == (
            {0, 11, 13, 255} if "0000_" in file.name else {11, 13, 255}
        )
        file.unlink()
        convert(str(file).replace("_labelTrainIds.png", "_polygons.json"))
        assert file.read_bytes() == ours


def test_instances_are_those_of_mmdetection(folder, tmp_path, capfd):
    assert derive("cityscapes", str(folder))["instancesonly"] == 2
    theirs = converter("mmdet")
    for split in ("train", "val"):
        files = theirs.collect_files(
            str(folder / "leftImg8bit" / split), str(folder / "gtFine" / split)
        )
        infos = theirs.collect_annotations(sorted(files))
        expected = theirs.cvt_annotations(infos, str(tmp_path / "theirs.json"))
        ours = folder / f"annotations/instancesonly_filtered_gtFine_{split}.json"
        for one in expected["annotations"]:
            one["id"] += 1  # theirs start at 0, which pycocotools takes for no match
        assert json.loads(ours.read_text()) == json.loads(json.dumps(expected))
        assert len(expected["annotations"]) == 6
        assert {one["iscrowd"] for one in expected["annotations"]} == {0, 1}


def test_mmdetection_reads_the_instances(folder):
    from mmdet.datasets import CityscapesDataset

    derive("cityscapes", str(folder))
    dataset = CityscapesDataset(
        data_root=str(folder),
        ann_file="annotations/instancesonly_filtered_gtFine_train.json",
        data_prefix={"img": "leftImg8bit/train/"},
        pipeline=[],
    )
    assert len(dataset) == 2 and len(dataset[0]["instances"]) == 3


def test_labels_less_one_for_detectron2(tmp_path):
    ade20k(tmp_path)
    assert derive("ade20k", str(tmp_path)) == {"annotations_detectron2": 4}
    for file in (tmp_path / "annotations").rglob("*.png"):
        made = tmp_path / "annotations_detectron2" / file.relative_to(tmp_path / "annotations")
        before, after = read(file), read(made)
        assert after.dtype == np.uint8 and set(np.unique(after)) == {0, 149, 255}
        np.testing.assert_array_equal(after[before == 0], 255)
        np.testing.assert_array_equal(after[before > 0], before[before > 0] - 1)


def test_what_is_there_stays_and_the_rest_is_made(folder):
    derive("cityscapes", str(folder))
    files = sorted([*folder.rglob("*_labelTrainIds.png"), *(folder / "annotations").iterdir()])
    files[0].write_bytes(b"mine")
    files[1].unlink()
    times = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    made = derive("cityscapes", str(folder))
    assert sum(made.values()) == 1 and files[1].exists()
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert files[0].read_bytes() == b"mine"


@pytest.mark.slow
def test_several_processes_make_the_same(folder, tmp_path):
    cityscapes(tmp_path / "again")
    derive("cityscapes", str(folder))
    derive("cityscapes", str(tmp_path / "again"), jobs=2)
    names = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    assert len(names) == 22
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    "name, content, message",
    [
        (POLYGONS, b'{"imgWidth": 3', "is cut off or not JSON"),
        (POLYGONS, b"[" * 100_000, "nests lists or objects too deeply"),
        (POLYGONS, b'{"imgWidth": 0, "imgHeight": 0}', r"must have an imgWidth .* got \[0, 0\]"),
        (POLYGONS, b'{"imgWidth": 60000, "imgHeight": 60000}', "at most 178,956,970 pixels"),
        (
            POLYGONS,
            b'{"imgWidth": 9, "imgHeight": 9, "objects": [{"polygon": [[1e300, 0]]}]}',
            "within 10 times its 9x9 pixels, got",
        ),
        (
            POLYGONS,
            b'{"imgWidth": 3, "imgHeight": 3, "objects": '
            b'[{"label": "unicorn", "polygon": [[0, 0], [1, 1], [2, 0]]}]}',
            "cannot be used: ",
        ),
        (IDS, b"no image", "cannot be read: "),
        (IDS, None, "cannot be read: "),
    ],
)
def test_damage_is_named_and_leaves_nothing_half_made(folder, capfd, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        derive("cityscapes", str(folder))
    assert str(error.value).startswith(str(folder / name))
    assert not list(folder.rglob(".*"))


def test_a_full_disk_leaves_nothing_half_made(folder, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(UsageError, match="labelTrainIds.png cannot be written: No space left"):
        derive("cityscapes", str(folder))
    assert not list(folder.rglob(".*")) and not list(folder.rglob("*labelTrainIds*"))


@pytest.mark.parametrize("name", ["ade20k", "cityscapes"])
def test_folders_without_anything(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        derive(name, str(tmp_path))
    with pytest.raises(UsageError, match="does not exist"):
        derive(name, str(tmp_path / "nowhere"))


def test_cityscapesscripts_is_asked_for(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cityscapesscripts.helpers.labels", None)
    with pytest.raises(UsageError, match="pip install cityscapesscripts"):
        derive("cityscapes", str(folder))
