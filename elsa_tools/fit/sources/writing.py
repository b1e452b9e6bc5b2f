"""Write a checked source as both frameworks read it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.mask import area, decode

from elsa_core.data.coco import normalised
from elsa_core.data.coco_rules import is_crowd, problems
from elsa_core.data.label_maps import IGNORE, read_map
from elsa_core.data.mask_rules import rle_of
from elsa_core.data.problems import ERROR
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import make_folder, replacing
from elsa_tools.data.annotations import validate

from ..dataset import BOXES, INSTANCES, Part
from .tree import Sample, Source, few

# Rules whose warnings say nothing about a file that we have written, or only of one part.
SILENT = ("no-masks", "no-iscrowd", "no-area", "unused-category")


def folder_of(samples: Iterable[Sample]) -> Path:
    """Return the innermost folder that holds all images."""
    return Path(os.path.commonpath([sample.path.parent for sample in samples]))


def coco_of(samples: Sequence[Sample], classes: Sequence[str], task: str) -> dict[str, Any]:
    """Return a part in COCO's format: images by name, ids from 1, no masks for boxes."""
    folder = folder_of(samples)
    ids = {name: number for number, name in enumerate(classes, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    by_name = {sample.path.relative_to(folder).as_posix(): sample for sample in samples}
    for number, (name, sample) in enumerate(sorted(by_name.items()), start=1):
        width, height = sample.size or (0, 0)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for one in sample.annotations:
            made = {"id": len(annotations) + 1, "image_id": number}
            made |= {"category_id": ids[one["category"]], "iscrowd": 0, **one}
            del made["category"]
            if task == BOXES:
                made.pop("segmentation", None)
            annotations.append(made)
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def checked(path: Path, coco: dict[str, Any], task: str, progress: bool) -> list[str]:
    """Normalise a part in place. Return the warnings about it.

    Raises:
        UsageError: the part has an error.
    """
    found = validate(str(path), normalised(coco, task == INSTANCES), progress=progress)
    if errors := [one for one in found if one.level == ERROR]:
        raise UsageError(str(errors[0]).removeprefix(f"{ERROR}: "))
    return [str(one).partition(": ")[2] for one in found if one.rule not in SILENT]


def check_objects(source: Source, task: str) -> None:
    """Check the objects of each image, so that messages name the file that they come from.

    Raises:
        UsageError: an object has an error.
    """
    for sample in source.samples:
        if sample.annotations:
            content = coco_of([sample], source.classes, task)
            for one in problems(content, task != BOXES):
                if one.level == ERROR and one.rule != "no-objects":
                    raise UsageError(f"{sample.source}: {one}")


def write_coco(path: Path, coco: dict[str, Any], images: Path) -> Part:
    """Write a file in COCO's format, the same bytes for the same content.

    The part's ``images`` are absolute: a config with them works from any folder.
    """
    make_folder(str(path.parent), "folder")
    with replacing(path) as file:
        file.write(json.dumps(coco).encode())
    return Part(images.absolute(), path, None, len(coco["images"]))


def link_maps(
    samples: Sequence[Sample], out: Path, labels: Callable[[Sample], np.ndarray] | None
) -> Part:
    """Make folders of symbolic links to images and label maps with the same relative stems.

    Args:
        out: folder of the part; files in its folders images and maps that belong to no image of
            it, and links, are replaced.
        labels: function that returns the values of a label map, which are then written; None for
            links to the label maps of the samples.
    """
    folder = folder_of(samples)
    names = {sample.path.relative_to(folder): sample for sample in samples}
    stems = Counter(name.with_suffix("") for name in names)
    if twice := [name for name in names if stems[name.with_suffix("")] > 1]:
        raise UsageError(
            f"{folder} has images of one name, but label maps are found by it: "
            f"{few(map(str, twice))}"
        )
    wanted = {out / "images" / name for name in names}
    wanted |= {out / "maps" / name.with_suffix(".png") for name in names}
    for path in [*(out / "images").rglob("*"), *(out / "maps").rglob("*")]:
        if path.is_symlink() or (path.is_file() and path not in wanted):
            path.unlink()
    for parent in sorted({path.parent for path in wanted}):
        make_folder(str(parent), "folder")
    for name, sample in names.items():
        _link(out / "images" / name, sample.path)
        target = out / "maps" / name.with_suffix(".png")
        if labels is None:
            _link(target, sample.map or sample.path)
        else:
            with replacing(target, sweeping=False) as file:
                Image.fromarray(labels(sample)).save(file, format="PNG")
    return Part(out / "images", None, out / "maps", len(samples))


def binary(sample: Sample) -> np.ndarray:
    """Return a label map of 0 and 255 as 0 and 1."""
    return (read_map(str(sample.map), str(sample.map)) > 0).astype(np.uint8)


def drawn(sample: Sample, classes: Sequence[str]) -> np.ndarray:
    """Draw the objects of an image: 0 is background, 255 a crowd, n + 1 the nth class.

    Smaller objects lie on top of larger ones.
    """
    width, height = sample.size or (0, 0)
    values = np.zeros((height, width), np.uint8)
    masks = [(rle_of(one["segmentation"], width, height), one) for one in sample.annotations]
    for mask, one in sorted(masks, key=lambda pair: -int(area(pair[0]))):
        label = IGNORE if is_crowd(one) else classes.index(one["category"]) + 1
        values[decode(mask).astype(bool)] = label
    return values


def _link(link: Path, target: Path) -> None:
    try:
        link.symlink_to(os.path.abspath(target))
    except OSError as error:
        raise UsageError(f"{link} cannot be made: {error.strerror}") from error
