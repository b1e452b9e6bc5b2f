"""Makes the files that the frameworks read but the downloads do not contain.

Each file is written under a temporary name and then renamed, so that an interrupted run leaves only
complete files. Existing files are not changed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from typing import Any

import numpy as np
import pycocotools.mask
from PIL import Image
from tqdm import tqdm

from elsa_core.data.coco import read_json
from elsa_core.data.images import LONGEST_SIDE, MOST_PIXELS, open_image
from elsa_core.data.problems import FARTHEST, are_numbers, shown
from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.runtime.files import make_folder, replacing, sweep
from elsa_core.runtime.packages import need

SPLITS = ("train", "val")


def derive(name: str, folder: str, *, jobs: int = 1, progress: bool = False) -> dict[str, int]:
    """Makes the missing derived files of a data set.

    Args:
        name: "ade20k" or "cityscapes".
        folder: folder of the data set.
        jobs: number of processes.

    Returns the number of files made of each kind. Raises UsageError, which names the file, if a
    source file is missing or damaged.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"the folder {folder} does not exist")
    return {"ade20k": _ade20k, "cityscapes": _cityscapes}[name](folder, jobs, progress)


def _ade20k(folder: str, jobs: int, progress: bool) -> dict[str, int]:
    """Makes annotations_detectron2: labels minus one, 255 for no class."""
    made = 0
    for split in ("training", "validation"):
        source = os.path.join(folder, "annotations", split)
        target = os.path.join(folder, "annotations_detectron2", split)
        names = _files(source, ".png")
        pairs = [(os.path.join(source, name), os.path.join(target, name)) for name in names]
        made += _each(_reduce_labels, pairs, f"annotations_detectron2/{split}", jobs, progress)
    return {"annotations_detectron2": made}


def _cityscapes(folder: str, jobs: int, progress: bool) -> dict[str, int]:
    """Makes labelTrainIds.png from the polygons, and a COCO file of the instances of each split."""
    need("cityscapesscripts.helpers.labels", "derive cityscapes")
    ending = "_gtFine_polygons.json"
    pairs = []
    for split in SPLITS:
        for city in _folders(os.path.join(folder, "gtFine", split)):
            for name in _files(city, ending):
                path = os.path.join(city, name)
                pairs.append((path, path.removesuffix(ending) + "_gtFine_labelTrainIds.png"))
    made = {"labelTrainIds": _each(_draw_train_ids, pairs, "labelTrainIds", jobs, progress)}
    made["instancesonly"] = 0
    for split in SPLITS:
        name = f"instancesonly_filtered_gtFine_{split}.json"
        target = os.path.join(folder, "annotations", name)
        if not os.path.exists(target):
            coco = _instances(folder, split, jobs, progress)
            make_folder(os.path.dirname(target), "the folder")
            with replacing(target) as file:
                file.write(json.dumps(coco).encode())
            made["instancesonly"] += 1
    return made


def _reduce_labels(pair: tuple[str, str]) -> None:
    source, target = pair
    labels = _read(source)
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise UsageError(f"{source} is not a label map of one byte a pixel")
    # uint8: 0, no class, becomes 255.
    image = Image.fromarray(labels - np.uint8(1))
    with replacing(target, sweeping=False) as file:
        image.save(file, format="PNG")


def _draw_train_ids(pair: tuple[str, str]) -> None:
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    source, target = pair
    annotation = Annotation()
    _check_polygons(source)
    try:
        annotation.fromJsonFile(source)
        image = createLabelImage(annotation, "trainIds")
    except (Exception, SystemExit) as error:  # it ends the process on a label that it does not know
        raise UsageError(f"{source} cannot be used: {_why(error)}") from error
    with replacing(target, sweeping=False) as file:
        image.save(file, format="PNG")


def _check_polygons(path: str) -> None:
    """Raises UsageError if drawing the polygons would take more memory than an image may."""
    content = read_json(path)
    sides: list[Any] = []
    if type(content) is dict:
        sides = [content.get(key) for key in ("imgWidth", "imgHeight")]
    if not sides or not all(type(side) is int and 0 < side <= LONGEST_SIDE for side in sides):
        found = f", got {shown(sides)}" if sides else ""
        raise UsageError(
            f"{path} must have an imgWidth and imgHeight of 1 to {LONGEST_SIDE}{found}"
        )
    if math.prod(sides) > MOST_PIXELS:
        raise UsageError(f"{path} must be of at most {MOST_PIXELS:,} pixels, got {sides}")
    far = FARTHEST * max(sides)
    objects = content.get("objects")
    for one in objects if isinstance(objects, list) else []:
        polygon = one.get("polygon") if isinstance(one, dict) else None
        point: Any
        for point in polygon if isinstance(polygon, list) else [None]:
            numbers = isinstance(point, list) and len(point) == 2 and are_numbers(point)
            if not numbers or max(map(abs, point)) > far:
                raise UsageError(
                    f"{path} must have polygons of points [x, y] within {FARTHEST} times its "
                    f"{sides[0]}x{sides[1]} pixels, got {shown(point)}"
                )


def _instances(folder: str, split: str, jobs: int, progress: bool) -> dict[str, Any]:
    """Returns all instances of a split in the format that MMDetection's CityscapesDataset reads.

    Cities and images are in alphabetical order, ids count from 0.
    """
    ending = "_leftImg8bit.png"
    images_folder = os.path.join(folder, "leftImg8bit", split)
    stems = [
        os.path.join(os.path.basename(city), name.removesuffix(ending))
        for city in _folders(images_folder)
        for name in _files(city, ending)
    ]
    if not stems:
        raise UsageError(f"{images_folder} has no images */*{ending}")
    ids = os.path.join(folder, "gtFine", split)
    maps = [os.path.join(ids, f"{stem}_gtFine_instanceIds.png") for stem in stems]
    found = _run(_instances_of_image, maps, f"instancesonly {split}", jobs, progress)
    images: list[Any] = []
    annotations: list[Any] = []
    for number, (stem, (size, instances)) in enumerate(zip(stems, found, strict=True)):
        names = {"file_name": stem + ending, "segm_file": f"{stem}_gtFine_labelIds.png"}
        images.append({"id": number, **names, "height": size[0], "width": size[1]})
        for instance in instances:
            annotations.append({**instance, "image_id": number, "id": len(annotations) + 1})
    categories = [{"id": label.id, "name": label.name} for label in _instance_labels()]
    return {"images": images, "categories": categories, "annotations": annotations}


def _instances_of_image(path: str) -> tuple[tuple[int, int], list[dict]]:
    """Returns (height, width) of an instanceIds map, and its instances.

    An id is 1000 times the label plus a number; the label alone stands for a group.
    """
    ids = _read(path)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(f"{path} is not a map of instance ids")
    evaluated = {label.id for label in _instance_labels()}
    instances = []
    for one in np.unique(ids).tolist():
        label = one // 1000 if one >= 1000 else one
        if label not in evaluated:
            continue
        mask = pycocotools.mask.encode(np.asfortranarray(ids == one, dtype=np.uint8))
        instances.append(
            {
                "iscrowd": int(one < 1000),
                "category_id": label,
                "bbox": pycocotools.mask.toBbox(mask).tolist(),
                "area": int(pycocotools.mask.area(mask)),
                "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
            }
        )
    return ids.shape, instances


def _instance_labels() -> list[Any]:
    """Returns the 8 labels whose instances are evaluated."""
    from cityscapesscripts.helpers.labels import labels

    return [label for label in labels if label.hasInstances and not label.ignoreInEval]


def _each(
    make: Callable[[tuple[str, str]], None],
    pairs: list[tuple[str, str]],
    what: str,
    jobs: int,
    progress: bool,
) -> int:
    """Makes the targets that do not exist; returns their number."""
    if not pairs:
        raise UsageError(f"there is nothing to make {what} from")
    missing = [pair for pair in pairs if not os.path.exists(pair[1])]
    for target in {os.path.dirname(target) for _, target in missing}:
        make_folder(target, "the folder")
        sweep(target)
    _run(make, missing, what, jobs, progress)
    return len(missing)


def _run(
    function: Callable[[Any], Any], items: list, what: str, jobs: int, progress: bool
) -> list[Any]:
    """Returns the results in the order of the items."""

    def shown(results: Iterable[Any]) -> list[Any]:
        return list(tqdm(results, what, len(items), disable=None if progress else True))

    if jobs == 1 or len(items) < 2:
        return shown(map(function, items))
    with get_context("spawn").Pool(jobs) as pool:
        return shown(pool.imap(function, items, chunksize=4))


def _read(path: str) -> np.ndarray:
    try:
        with open_image(path) as image:
            return np.array(image)
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a damaged file
        raise UsageError(f"{path} cannot be read: {_why(error)}") from error


def _folders(path: str) -> list[str]:
    return [entry.path for entry in _entries(path) if entry.is_dir()]


def _files(path: str, ending: str) -> list[str]:
    names = [entry.name for entry in _entries(path)]
    return [name for name in names if name.endswith(ending) and not name.startswith(".")]


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise UsageError(f"the folder {path} cannot be read: {error.strerror}") from error


def _why(error: BaseException) -> str:
    return one_line(error) or type(error).__name__
