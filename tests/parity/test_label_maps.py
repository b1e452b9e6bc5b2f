"""Label maps: their images, their values, and what both frameworks refuse before a run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from d2_sem_seg_tiny import DIGITS, NAMES, few_images, overrides
from detectron2.data import DatasetCatalog
from mm_tiny import CONFIGS, options
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope
from PIL import Image

from elsa_core.data.images import ENDINGS
from elsa_core.data.label_maps import only_none, pair_files
from elsa_core.runtime.errors import DamagedFileError, UsageError
from elsa_d2 import load_config, register_sem_seg_datasets
from elsa_d2.data.safe_loading import read_labels as read_in_detectron2
from elsa_d2.data.sem_seg import check_sem_seg_dataset
from elsa_mm.label_maps import LabelMapDataset

pytestmark = pytest.mark.usefixtures("clean_catalog")


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_pairs_have_any_ending_in_any_case_and_any_depth(tmp_path):
    touch(tmp_path, *(f"images/{number}{end}" for number, end in enumerate(ENDINGS)))
    touch(tmp_path, *(f"maps/{number}.png" for number in range(len(ENDINGS))))
    touch(tmp_path, "images/sub/A.b.JPG", "maps/sub/A.b.PNG", "images/._0.jpg", "images/notes.txt")
    images, maps = str(tmp_path / "images"), str(tmp_path / "maps")
    pairs = pair_files(images, maps)
    assert len(pairs) == len(ENDINGS) + 1
    assert pairs[-1] == (f"{images}/sub/A.b.JPG", f"{maps}/sub/A.b.PNG")
    assert all(Path(image).stem == Path(map_).stem for image, map_ in pairs)
    assert pair_files(images, maps, stems=["1"]) == [pairs[1]]
    assert pair_files(images, None)[0] == (f"{images}/0.jpg", None)
    shutil.move(maps, tmp_path / "images/maps")  # a folder in the other one
    assert len(pair_files(images, f"{images}/maps")) == len(pairs)


@pytest.mark.parametrize(
    "names, sentence",
    [
        (["images/b.PNG"], "label map folder {}/maps lacks 1 of 2 label maps, the first is b.png"),
        (
            ["maps/b.png"],
            "lacks 1 of the 2 images that have a label map, the first is b (endings: ",
        ),
        (["images/a.png"], "image folder {}/images has two images of one name, a."),
    ],
)
def test_what_has_no_partner_is_refused(tmp_path, names, sentence):
    touch(tmp_path, "images/a.jpg", "maps/a.png", *names)
    with pytest.raises(UsageError) as caught:
        pair_files(str(tmp_path / "images"), str(tmp_path / "maps"))
    assert sentence.format(tmp_path) in str(caught.value)
    with pytest.raises(UsageError, match="lacks 1 of the 1 listed images, the first is c"):
        pair_files(str(tmp_path / "images"), str(tmp_path / "maps"), stems=["c"])


# Both frameworks' readers of one file; reduce_zero_label reads 0 as none and begins at 1.


def read_in_mmsegmentation(path, num_classes, reduce=False):
    step = dict(type="elsa_mm.label_maps.LoadLabelMap", num_classes=num_classes)
    results = {"seg_map_path": path, "reduce_zero_label": reduce, "seg_fields": []}
    with DefaultScope.overwrite_default_scope("mmseg"):
        return TRANSFORMS.build(step)(results)["gt_seg_map"]


def save(path, values, kind):
    values = np.array([values])
    if kind == "palette":
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette([9, 8, 7] * 256)
    elif kind == "colour":
        image = Image.fromarray(np.repeat(values[..., None], 3, 2).astype(np.uint8))
    else:
        image = Image.fromarray(values.astype(kind))
    image.save(path)
    return str(path)


@pytest.mark.parametrize("read", [read_in_detectron2, read_in_mmsegmentation])
@pytest.mark.parametrize(
    "kind, name",
    [("uint8", "x.png"), ("uint16", "x.png"), ("palette", "x.png"), ("uint16", "x.tif")],
)
def test_values_are_read_as_wide_as_they_are(tmp_path, read, kind, name):
    path = save(tmp_path / name, [0, 1, 2, 255], kind)
    labels = read(path, 3)
    assert labels.dtype == np.uint8 and labels.tolist() == [[0, 1, 2, 255]]
    assert read(path, 2, True).tolist() == [[255, 0, 1, 255]]
    with pytest.raises(
        DamagedFileError, match=r"must be 0..1 for 2 classes.* got 2 in .*x\.(png|tif)"
    ):
        read(path, 2)
    with pytest.raises(
        DamagedFileError, match=r"must be 1..1 for 1 classes, or 0 or 255 .* got 2 in"
    ):
        read(path, 1, True)


@pytest.mark.parametrize("read", [read_in_detectron2, read_in_mmsegmentation])
def test_other_maps(tmp_path, read):
    bits = save(tmp_path / "bits.png", [0, 1, 1, 0], "bool")
    assert read(bits, 2).tolist() == [[0, 1, 1, 0]]
    # Cut to 8 bits these would be classes.
    for value in (256, 3 + 7 * 256, 65535):
        deep = save(tmp_path / "deep.png", [0, value], "uint16")
        for reduce in (False, True):
            with pytest.raises(DamagedFileError, match=f"got {value} in .*deep.png"):
                read(deep, 255, reduce)
    for kind, name in (("colour", "c.png"), ("float32", "f.tif")):
        with pytest.raises(DamagedFileError, match=f"one channel of whole numbers, got .*{name}"):
            read(save(tmp_path / name, [0, 1], kind), 2)
    with pytest.raises(DamagedFileError, match="at most 255 classes, got 300"):
        read(bits, 300)


def test_maps_of_nothing_but_0_and_255(tmp_path):
    paths = [
        save(tmp_path / f"{n}.png", values, "uint8") for n, values in enumerate([[0], [0, 255]])
    ]
    assert only_none(paths, False) == (
        "hold only 0 and 255, but 255 stands for no class: write 1 for the second class"
    )
    assert only_none(paths, True).endswith("0 and 255 stand for no class: classes begin at 1")
    assert only_none(paths[:1], False) is None
    assert only_none([*paths, save(tmp_path / "c.png", [1], "uint8"), "not read"], False) is None


# Runs.


@pytest.fixture
def copy(digits, tmp_path):
    return few_images(digits, tmp_path / "copy")


def change_endings(root):
    """.jpg, .PNG and one in a subfolder, in both parts."""
    for part in ("training", "validation"):
        images, maps = (root / kind / part for kind in ("images", "annotations"))
        _, second, third = sorted(images.iterdir())
        Image.open(second).save(second.with_suffix(".PNG"))
        second.unlink()
        (images / "sub").mkdir()
        (maps / "sub").mkdir()
        third.rename(images / "sub" / third.name)
        (maps / f"{third.stem}.png").rename(maps / "sub" / f"{third.stem}.png")


def test_both_frameworks_take_all_endings(copy):
    change_endings(copy)
    register_sem_seg_datasets(load_config(DIGITS, overrides(copy)))
    check_sem_seg_dataset(NAMES[0], 11)
    records = DatasetCatalog.get(NAMES[0])
    folders = dict(img_path="images/training", seg_map_path="annotations/training")
    with DefaultScope.overwrite_default_scope("mmseg"):
        dataset = DATASETS.build(
            dict(type=LabelMapDataset, data_root=str(copy), data_prefix=folders, pipeline=[])
        )
    found = [
        (x["img_path"], x["seg_map_path"]) for x in map(dataset.get_data_info, range(len(dataset)))
    ]
    assert found == [(x["file_name"], x["sem_seg_file_name"]) for x in records]
    assert [Path(image).name for image, _ in found] == ["000001.jpg", "000002.PNG", "000003.jpg"]


def only_255(root):
    for file in (root / "annotations/validation").iterdir():
        Image.fromarray(np.where(np.array(Image.open(file)) > 1, 255, 0).astype(np.uint8)).save(
            file
        )


def test_what_a_data_set_of_one_ending_would_leave_out(refusal, copy):
    change_endings(copy)
    plain = {f"{part}_dataloader.dataset.type": "BaseSegDataset" for part in ("train", "val")}
    sentence = refusal("train", CONFIGS["mmseg"], *options("mmseg", copy, **plain))
    assert sentence.startswith(
        f"the train data leaves out 1 of the 3 images in {copy}/images/training, which do not end "
        "in .jpg (img_suffix), the first is 000002.PNG: rename them, or "
    )


def test_masks_of_0_and_255_are_refused_before_a_run(refusal, copy):
    only_255(copy)
    words = "hold only 0 and 255, but 0 and 255 stand for no class: classes begin at 1"
    sentence = refusal("train", CONFIGS["mmseg"], *options("mmseg", copy))
    folder = copy / "annotations/validation"
    assert sentence == f"the label maps of the val data in {folder} {words}"
    register_sem_seg_datasets(load_config(DIGITS, overrides(copy)))
    with pytest.raises(UsageError, match=f"^the label maps in {folder} {words}$"):
        check_sem_seg_dataset(NAMES[1], 11)
