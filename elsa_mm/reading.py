"""Names the file when a data set's pipeline meets a damaged one, in workers too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from mmengine.runner import Runner

from elsa_core.errors import DamagedFileError, UsageError, one_line
from elsa_data.coco import missing_files
from elsa_data.images import cut_off

IGNORE = 255


def watch_reading(runner: Runner) -> None:
    """From now on, the runner's data sets raise DamagedFileError, which names the file, for
    images, label maps and annotations that cannot be read or do not fit."""
    build = runner.build_dataloader

    def build_watched(*args: Any, **options: Any) -> Any:
        loader = build(*args, **options)
        for dataset in leaves(loader.dataset):
            _watch(dataset, dataset)
        return loader

    runner.build_dataloader = build_watched  # type: ignore[method-assign]


def leaves(dataset: Any) -> Iterator[Any]:
    """A data set and, in wrappers such as RepeatDataset and ConcatDataset, those inside."""
    yield dataset
    for child in [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or [])]:
        if child is not None:
            yield from leaves(child)


def check_label_maps(dataset: Any, part: str) -> None:
    """Raises UsageError unless each image of MMSegmentation's data sets has a label map."""
    for one in leaves(dataset):
        if not hasattr(one, "seg_map_suffix") or not hasattr(one, "reduce_zero_label"):
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


def _watch(node: Any, dataset: Any) -> None:
    """Replaces the transforms that read, in a pipeline and in the transforms that hold others."""
    for name in ("pipeline", "transforms", "subroutines"):
        children = getattr(node, name, None)
        if isinstance(children, list):
            for index, child in enumerate(children):
                if type(child).__name__.startswith("Load"):
                    children[index] = Reading(child, dataset)
                else:
                    _watch(child, dataset)
        elif children is not None:
            _watch(children, dataset)


class Reading:
    """A transform that reads a file.

    Args:
        transform: mmcv's LoadImageFromFile or LoadAnnotations, or a toolbox's.
        dataset: whose pipeline it is part of.
    """

    def __init__(self, transform: Callable[[dict], dict | None], dataset: Any) -> None:
        self.transform = transform
        metainfo = getattr(dataset, "metainfo", None) or {}
        # Only MMSegmentation's label maps hold the classes of the data set.
        self.reduces = getattr(dataset, "reduce_zero_label", None)
        self.classes = len(metainfo.get("classes") or ()) if self.reduces is not None else 0
        self.ignore = getattr(dataset, "ignore_index", IGNORE)

    def __call__(self, results: dict) -> dict | None:
        """Raises DamagedFileError."""
        before = results.get("img")
        try:
            read = self.transform(results)
        except UsageError:
            raise
        except Exception as error:  # each decoder has its own kinds
            what, why = self._what(results)
            raise DamagedFileError(f"{what} cannot be read: {why or one_line(error)}") from error
        if read is not None and read.get("img") is not before:
            _check_image(read)
        if read is not None and self.classes and read.get("gt_seg_map") is not None:
            self._check_labels(read)
        return read

    def __repr__(self) -> str:
        return repr(self.transform)

    def _what(self, results: dict) -> tuple[str, str | None]:
        """What was to be read and, where the file itself tells, what is wrong with it."""
        if "Image" in type(self.transform).__name__:
            path = results.get("img_path")
            local = isinstance(path, str) and "://" not in path
            return f"image {path}", cut_off(path) if local else None
        if getattr(self.transform, "with_seg", False) and results.get("seg_map_path"):
            path = results["seg_map_path"]
            return f"label map {path}", None if "://" in path else cut_off(path)
        return f"the annotations of image {results.get('img_path')}", None

    def _check_labels(self, results: dict) -> None:
        labels, path = results["gt_seg_map"], results.get("seg_map_path")
        if labels.ndim != 2:
            raise DamagedFileError(
                f"a label map must have one channel, got {path} of shape {labels.shape}"
            )
        size = results.get("ori_shape")
        if size is not None and tuple(size) != labels.shape:
            raise DamagedFileError(
                f"a label map must be as large as its image, got {path} of {labels.shape} pixels "
                f"for {tuple(size)}"
            )
        wrong = labels[(labels >= self.classes) & (labels != self.ignore)]
        if wrong.size:
            first = int(bool(self.reduces))
            raise DamagedFileError(
                f"labels must be {first}..{self.classes + first - 1} for {self.classes} classes, "
                f"or {'0 or ' * first}{self.ignore} for none, got {wrong.max() + first} in {path}"
            )


def _check_image(results: dict) -> None:
    """OpenCV gives an image for half a JPEG, and nobody compares its size with the annotations."""
    path, size = results.get("img_path"), results.get("img_shape")
    if not isinstance(path, str) or not os.path.isfile(path):  # not on this machine's disks
        return
    if problem := cut_off(path):
        raise DamagedFileError(f"image {path} cannot be read: {problem}")
    said = results.get("height"), results.get("width")
    if "instances" in results and None not in said and tuple(size or said) != said:
        raise DamagedFileError(
            f"image {path} must have the {said} pixels that its annotations say, got {tuple(size)}"
        )
