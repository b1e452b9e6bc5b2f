"""Layouts of the data sets as data: folders, file counts, labels, and download locations.

Counts are those of the official releases: COCO 2017, ADE20K of the 2016 challenge, Cityscapes with
fine annotations, ImageNet-1K of 2012. The paths are those of the frameworks' own configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DETECTRON2, OPENMMLAB = "Detectron2", "OpenMMLab"
FRAMEWORKS = (DETECTRON2, OPENMMLAB)


@dataclass(frozen=True)
class Part:
    """Files of one kind in a folder.

    Args:
        folder: folder, relative to the data set's.
        suffix: end of the file names; paired files share the rest of the name.
        count: total number of files.
        archive: archive that contains the files; empty for derived files.
        labels: values that a label map may contain; None for an image.
        nested: whether the files are in subfolders (cities, classes), not in the folder itself.
        subfolders: number of subfolders; None for any number.
        each: smallest and largest number of files in a subfolder.
        pair: name shared by the parts whose files belong together, such as images and label maps.
        derive: data set's name in `prepare_data.py derive`; empty for downloaded files.
        frameworks: frameworks that read the files.
        purpose: use of derived files.
    """

    folder: str
    suffix: str
    count: int
    archive: str = ""
    labels: frozenset[int] | None = None
    nested: bool = False
    subfolders: int | None = None
    each: tuple[int, int] | None = None
    pair: str = ""
    derive: str = ""
    frameworks: tuple[str, ...] = FRAMEWORKS
    purpose: str = ""

    @property
    def pattern(self) -> str:
        return f"{self.folder}/{'*/' * self.nested}*{self.suffix}"


@dataclass(frozen=True)
class Annotations:
    """A file in COCO's format: ``count`` images in the folder ``images``, and its categories.

    The other fields are those of `Part`.
    """

    file: str
    images: str
    count: int
    categories: int
    archive: str = ""
    derive: str = ""
    frameworks: tuple[str, ...] = FRAMEWORKS
    purpose: str = ""

    @property
    def pattern(self) -> str:
        return self.file


@dataclass(frozen=True)
class Layout:
    """A data set.

    Args:
        page: download page.
        archives: file name -> location and size.
        places: framework -> data set's folder, relative to the framework's folder of data sets.
        notes: further remarks on the download.
    """

    name: str
    title: str
    page: str
    archives: Mapping[str, str]
    places: Mapping[str, str]
    parts: tuple[Part, ...]
    annotations: tuple[Annotations, ...] = ()
    notes: tuple[str, ...] = ()

    def items(self, frameworks: tuple[str, ...] = FRAMEWORKS) -> list[Part | Annotations]:
        """Returns the items that at least one of the frameworks reads."""
        everything: list[Part | Annotations] = [*self.parts, *self.annotations]
        return [item for item in everything if set(item.frameworks) & set(frameworks)]


def _coco() -> Layout:
    counts = {"train2017": 118_287, "val2017": 5_000}
    server, annotations = "http://images.cocodataset.org", "annotations_trainval2017.zip"
    return Layout(
        name="coco",
        title="COCO 2017",
        page="https://cocodataset.org/#download",
        archives={
            "train2017.zip": f"{server}/zips/train2017.zip (18 GB)",
            "val2017.zip": f"{server}/zips/val2017.zip (1 GB)",
            annotations: f"{server}/annotations/{annotations} (241 MB)",
        },
        places={DETECTRON2: "coco", OPENMMLAB: "coco"},
        parts=tuple(Part(name, ".jpg", n, archive=f"{name}.zip") for name, n in counts.items()),
        annotations=tuple(
            Annotations(f"annotations/instances_{name}.json", name, count, 80, annotations)
            for name, count in counts.items()
        ),
    )


def _ade20k() -> Layout:
    archive = "ADEChallengeData2016.zip"
    derived: dict[str, Any] = {
        "labels": frozenset(range(150)) | {255},
        "derive": "ade20k",
        "frameworks": (DETECTRON2,),
        "purpose": "Detectron2's name for ADE20K: classes 0..149, 255 for none",
    }
    parts = []
    for split, count in (("training", 20_210), ("validation", 2_000)):
        parts += [
            Part(f"images/{split}", ".jpg", count, archive, pair=split),
            Part(f"annotations/{split}", ".png", count, archive, frozenset(range(151)), pair=split),
            Part(f"annotations_detectron2/{split}", ".png", count, pair=split, **derived),
        ]
    return Layout(
        name="ade20k",
        title="ADE20K (scene parsing challenge 2016)",
        page="http://sceneparsing.csail.mit.edu/",
        archives={archive: f"http://data.csail.mit.edu/places/ADEchallenge/{archive} (923 MB)"},
        places={DETECTRON2: "ADEChallengeData2016", OPENMMLAB: "ade/ADEChallengeData2016"},
        parts=tuple(parts),
    )


def _cityscapes() -> Layout:
    images, labels = "leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"
    train_ids: dict[str, Any] = {
        "labels": frozenset(range(19)) | {255},
        "derive": "cityscapes",
        "purpose": "semantic segmentation",
    }
    parts, annotations = [], []
    for split, count, cities in (("train", 2_975, 18), ("val", 500, 3)):
        folder = f"gtFine/{split}"
        common: dict[str, Any] = {"nested": True, "subfolders": cities, "pair": split}
        parts += [
            Part(f"leftImg8bit/{split}", "_leftImg8bit.png", count, images, **common),
            Part(folder, "_gtFine_polygons.json", count, labels, **common),
            Part(folder, "_gtFine_instanceIds.png", count, labels, **common),
            Part(folder, "_gtFine_labelIds.png", count, labels, frozenset(range(34)), **common),
            Part(folder, "_gtFine_labelTrainIds.png", count, **train_ids, **common),
        ]
        annotations.append(
            Annotations(
                f"annotations/instancesonly_filtered_gtFine_{split}.json",
                f"leftImg8bit/{split}",
                count,
                categories=8,
                derive="cityscapes",
                frameworks=(OPENMMLAB,),
                purpose="instance segmentation in MMDetection",
            )
        )
    return Layout(
        name="cityscapes",
        title="Cityscapes (fine annotations)",
        page="https://www.cityscapes-dataset.com/downloads/",
        archives={
            images: "packageID 3 on the page (11 GB)",
            labels: "packageID 1 on the page (241 MB)",
        },
        places={DETECTRON2: "cityscapes", OPENMMLAB: "cityscapes"},
        parts=tuple(parts),
        annotations=tuple(annotations),
        notes=("the download needs an account at cityscapes-dataset.com",),
    )


def _imagenet() -> Layout:
    common: dict[str, Any] = {"suffix": ".JPEG", "nested": True, "subfolders": 1_000}
    train, val = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
    return Layout(
        name="imagenet",
        title="ImageNet-1K (ILSVRC 2012)",
        page="https://image-net.org/download-images.php",
        archives={
            train: "on the page (138 GB), an archive of a thousand archives",
            val: "on the page (6.3 GB), one folder for all classes",
        },
        places={OPENMMLAB: "imagenet"},
        parts=(
            Part("train", count=1_281_167, archive=train, each=(732, 1_300), **common),
            Part("val", count=50_000, archive=val, each=(50, 50), **common),
        ),
        notes=(
            "the download needs an account at image-net.org",
            "unpack the archive of each class of train into a folder with the archive's name "
            "(n01440764, ...), and sort the images of val into folders of the same names",
        ),
    )


LAYOUTS = {layout.name: layout for layout in (_coco(), _ade20k(), _cityscapes(), _imagenet())}
