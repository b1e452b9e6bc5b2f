"""Label maps in MMSegmentation: 16 bits, checked values, images with any ending.

Configs name the data set as `elsa_mm.label_maps.LabelMapDataset`: MMDetection needs no
MMSegmentation.
"""

from __future__ import annotations

import os
from io import BytesIO
from typing import Any

import mmengine
import numpy as np
from mmengine import fileio
from mmengine.registry import DATASETS, TRANSFORMS
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations

from elsa_core.data.coco import missing_files
from elsa_core.data.images import ENDINGS, reason
from elsa_core.data.label_maps import IGNORE, only_none, pair_files, read_labels
from elsa_core.runtime.errors import DamagedFileError, UsageError

from .nested import leaves


@DATASETS.register_module()
class LabelMapDataset(BaseSegDataset):
    """BaseSegDataset whose images may have any known ending, in any case, also in subfolders.

    The label map of SUB/X.JPG is SUB/X and `seg_map_suffix`; `img_suffix` has no effect. `ann_file`
    may list SUB/X of the images to use.

    Raises UsageError for images without a label map and label maps without an image.
    """

    def load_data_list(self) -> list[dict]:
        stems = None
        if self.ann_file and not os.path.isdir(self.ann_file):
            lines = mmengine.list_from_file(self.ann_file, backend_args=self.backend_args)
            stems = {line.strip() for line in lines}
        images, maps = (self.data_prefix.get(key) for key in ("img_path", "seg_map_path"))
        pairs = pair_files(images, maps, self.seg_map_suffix, stems)
        common = {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label}
        return [
            {
                "img_path": image,
                **({"seg_map_path": map_} if map_ else {}),
                **common,
                "seg_fields": [],
            }
            for image, map_ in pairs
        ]


@TRANSFORMS.register_module()
class LoadLabelMap(LoadAnnotations):
    """LoadAnnotations that reads 16 bits unchanged and refuses labels that are no class.

    Args:
        num_classes: of the data set; None: labels up to 254 are accepted.
        ignore: label of pixels without a class.
        options: LoadAnnotations'.

    Raises DamagedFileError, which names the file.
    """

    def __init__(
        self, num_classes: int | None = None, ignore: int = IGNORE, **options: Any
    ) -> None:
        super().__init__(**options)
        self.num_classes, self.ignore = num_classes, ignore

    def _load_seg_map(self, results: dict) -> None:
        path, reduce = results["seg_map_path"], results["reduce_zero_label"]
        if self.reduce_zero_label not in (None, reduce):
            raise UsageError(
                f"reduce_zero_label must be the data set's {reduce}, got {self.reduce_zero_label}"
            )
        label_map = results.get("label_map")  # from the file's classes to fewer of the config
        number = len(label_map) if label_map else self.num_classes or IGNORE
        try:
            content = BytesIO(fileio.get(path, backend_args=self.backend_args))
            size = results.get("ori_shape")
            size = None if size is None else tuple(size)
            labels = read_labels(content, path, number, reduce, self.ignore, size)
        except UsageError as error:
            raise DamagedFileError(str(error)) from error
        except OSError as error:
            why = reason(error, path)
            raise DamagedFileError(f"label map {path} cannot be read: {why}") from error
        if label_map:
            table = np.arange(256, dtype=np.uint8)
            table[list(label_map)] = list(label_map.values())
            labels = table[labels]
        results["gt_seg_map"] = labels
        results["seg_fields"].append("gt_seg_map")


def class_count(dataset: dict) -> int | None:
    """The number of classes in a data set's config, or of its type."""
    classes = (dataset.get("metainfo") or {}).get("classes")
    if classes is None:
        classes = getattr(_class_of(dataset), "METAINFO", {}).get("classes")
    if isinstance(classes, str):  # a file with one a line
        classes = mmengine.list_from_file(classes)
    return len(classes) if classes else None


def _class_of(dataset: dict) -> type | None:
    kind = dataset.get("type")
    with DATASETS.switch_scope_and_registry(None) as registry:
        return registry.get(kind) if isinstance(kind, str) else kind


def check_files(dataset: dict, part: str) -> None:
    """Raises UsageError if a data set would skip images, or has label maps without an image.

    Args:
        dataset: config of a data set; only MMSegmentation's are checked.
        part: "train", "val" or "test".
    """
    kind = _class_of(dataset)
    if kind is None or not issubclass(kind, BaseSegDataset):
        return
    one = DATASETS.build({**dataset, "pipeline": [], "lazy_init": True})
    images, maps = (one.data_prefix.get(key) for key in ("img_path", "seg_map_path"))
    if isinstance(one, LabelMapDataset) or one.ann_file or not (images and maps):
        return
    if images == maps or "://" in f"{images}{maps}" or not os.path.isdir(maps):
        return
    taken, labelled = _stems(images, one.img_suffix), _stems(maps, one.seg_map_suffix)
    left_out = sorted(
        name
        for name in fileio.list_dir_or_file(images, list_dir=False, recursive=True)
        if name.lower().endswith(ENDINGS)
        and not name.endswith(one.img_suffix)
        and os.path.splitext(name)[0] in labelled
    )
    if left_out:
        raise UsageError(
            f"the {part} data leaves out {len(left_out)} of the {len(taken) + len(left_out)} "
            f"images in {os.path.abspath(images)}, which do not end in {one.img_suffix} "
            f"(img_suffix), the first is {left_out[0]}: rename them, or set the data set's type to "
            "elsa_mm.label_maps.LabelMapDataset, which takes all endings"
        )
    if surplus := sorted(labelled - taken):
        raise UsageError(
            f"the {part} data has {len(surplus)} label maps without an image, the first is "
            f"{os.path.join(os.path.abspath(maps), surplus[0])}{one.seg_map_suffix}"
        )


def _stems(folder: str, suffix: str) -> set[str]:
    names = fileio.list_dir_or_file(folder, list_dir=False, suffix=suffix, recursive=True)
    return {name.removesuffix(suffix) for name in names}


def check_label_maps(dataset: Any, part: str) -> None:
    """Raises UsageError for missing label maps, and if they hold only 0 and 255."""
    for one in leaves(dataset):
        if not isinstance(one, BaseSegDataset):
            continue
        infos = (one.get_data_info(index) for index in range(len(one)))
        paths = [info["seg_map_path"] for info in infos if info.get("seg_map_path")]
        if any("://" in path for path in paths):
            continue
        if missing := missing_files("", paths):
            trains = missing[0].endswith("_gtFine_labelTrainIds.png")
            hint = "; make them with: python tools/prepare_data.py derive cityscapes"
            raise UsageError(
                f"the {part} data lacks {len(missing)} of {len(paths)} label maps, the first is "
                f"{os.path.abspath(missing[0])}{hint if trains else ''}"
            )
        if len(one.metainfo.get("classes") or ()) < 2 or one.ignore_index != IGNORE:
            continue
        if problem := only_none(paths, one.reduce_zero_label):
            folder = os.path.dirname(os.path.abspath(paths[0]))
            raise UsageError(f"the label maps of the {part} data in {folder} {problem}")
