"""What each data set consists of, as data: folders, counts, labels, and where to get the files.

Counts are those of the official releases: COCO 2017, ADE20K of the 2016 challenge, Cityscapes with
fine annotations, ImageNet-1K of 2012. The paths are those of the frameworks' own configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DETECTRON2, OPENMMLAB = "Detectron2", "OpenMMLab"
FRAMEWORKS = (DETECTRON2, OPENMMLAB)


@dataclass(frozen=True)
class Part:
    """Files of one kind in a folder.

    Args:
        folder: relative to the data set's.
        suffix: how their names end; the rest of the name is what pairs have in common.
        count: files in all.
        archive: that they come from; empty for derived files.
        labels: what a label map may contain; None for an image.
        nested: whether they lie in subfolders (cities, classes) and not in the folder itself.
        subfolders: how many; None for any number.
        each: fewest and most files in a subfolder.
        pair: parts of one name have one file each for the same thing.
        derive: the name that `prepare_data.py derive` has for it; empty for what is downloaded.
        frameworks: that read it.
        purpose: what derived files are needed for.
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
    """A file in COCO's format: of how many images in which folder, of how many categories."""

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
        page: where to get it.
        archives: file name -> where it is, and how large.
        places: framework -> its folder, relative to the folder of data sets.
        notes: what else to know before the download.
    """

    name: str
    title: str
    page: str
    archives: Mapping[str, str]
    places: Mapping[str, str]
    parts: tuple[Part, ...]
    annotations: tuple[Annotations, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def items(self, frameworks: tuple[str, ...] = FRAMEWORKS) -> list[Part | Annotations]:
        """What at least one of the frameworks reads."""
        everything: list[Part | Annotations] = [*self.parts, *self.annotations]
        return [item for item in everything if set(item.frameworks) & set(frameworks)]


def _coco() -> Layout:
    counts = {"train2017": 118_287, "val2017": 5_000}
    return Layout(
        name="coco",
        title="COCO 2017",
        page="https://cocodataset.org/#download",
        archives={
            "train2017.zip": "http://images.cocodataset.org/zips/train2017.zip (18 GB)",
            "val2017.zip": "http://images.cocodataset.org/zips/val2017.zip (1 GB)",
            "annotations_trainval2017.zip": "http://images.cocodataset.org/annotations/"
            "annotations_trainval2017.zip (241 MB)",
        },
        places={DETECTRON2: "coco", OPENMMLAB: "coco"},
        parts=tuple(Part(name, ".jpg", n, archive=f"{name}.zip") for name, n in counts.items()),
        annotations=tuple(
            Annotations(
                f"annotations/instances_{name}.json",
                name,
                count,
                categories=80,
                archive="annotations_trainval2017.zip",
            )
            for name, count in counts.items()
        ),
    )


def _ade20k() -> Layout:
    archive = "ADEChallengeData2016.zip"
    parts = []
    for split, count in (("training", 20_210), ("validation", 2_000)):
        parts += [
            Part(f"images/{split}", ".jpg", count, archive, pair=split),
            Part(f"annotations/{split}", ".png", count, archive, frozenset(range(151)), pair=split),
            Part(
                f"annotations_detectron2/{split}",
                ".png",
                count,
                labels=frozenset(range(150)) | {255},
                pair=split,
                derive="ade20k",
                frameworks=(DETECTRON2,),
                purpose="Detectron2's name for ADE20K: classes 0..149, 255 for none",
            ),
        ]
    return Layout(
        name="ade20k",
        title="ADE20K (scene parsing challenge 2016)",
        page="http://sceneparsing.csail.mit.edu/",
        archives={
            archive: f"http://data.csail.mit.edu/places/ADEchallenge/{archive} (923 MB)",
        },
        places={DETECTRON2: "ADEChallengeData2016", OPENMMLAB: "ade/ADEChallengeData2016"},
        parts=tuple(parts),
    )


def _cityscapes() -> Layout:
    images, labels = "leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"
    train_ids = frozenset(range(19)) | {255}
    parts, annotations = [], []
    for split, count, cities in (("train", 2_975, 18), ("val", 500, 3)):
        folder = f"gtFine/{split}"
        common: dict[str, Any] = {"nested": True, "subfolders": cities, "pair": split}
        parts += [
            Part(f"leftImg8bit/{split}", "_leftImg8bit.png", count, images, **common),
            Part(folder, "_gtFine_polygons.json", count, labels, **common),
            Part(folder, "_gtFine_instanceIds.png", count, labels, **common),
            Part(folder, "_gtFine_labelIds.png", count, labels, frozenset(range(34)), **common),
            Part(
                folder,
                "_gtFine_labelTrainIds.png",
                count,
                labels=train_ids,
                derive="cityscapes",
                purpose="semantic segmentation",
                **common,
            ),
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
    return Layout(
        name="imagenet",
        title="ImageNet-1K (ILSVRC 2012)",
        page="https://image-net.org/download-images.php",
        archives={
            "ILSVRC2012_img_train.tar": "on the page (138 GB), an archive of a thousand archives",
            "ILSVRC2012_img_val.tar": "on the page (6.3 GB), one folder for all classes",
        },
        places={OPENMMLAB: "imagenet"},
        parts=(
            Part(
                "train",
                count=1_281_167,
                archive="ILSVRC2012_img_train.tar",
                each=(732, 1_300),
                **common,
            ),
            Part("val", count=50_000, archive="ILSVRC2012_img_val.tar", each=(50, 50), **common),
        ),
        notes=(
            "the download needs an account at image-net.org",
            "unpack the archive of each class of train into a folder with the archive's name "
            "(n01440764, ...), and sort the images of val into folders of the same names",
        ),
    )


LAYOUTS = {layout.name: layout for layout in (_coco(), _ade20k(), _cityscapes(), _imagenet())}
