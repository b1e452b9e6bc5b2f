"""The digits data set as Cityscapes is laid out: two square images side by side, digits as cars.

Label maps and instance maps are what cityscapesscripts draws from the polygons.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import id2label, labels, name2label
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from .dataset import read_image, write_image

PARTS = {"train": "training", "val": "validation"}
CITIES = {"train": ("digitburg", "numberton"), "val": ("countwick",)}
# What the digits 0 to 9 stand for: the 8 classes with instances and 2 without.
STANDS_FOR = (
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    "traffic sign", "vegetation",
)  # fmt: skip
BACKGROUND, FLOOR, NOTHING = "building", "road", "out of roi"
FLOOR_PART = 0.2  # of the height, at the bottom
BORDER_PART = 1 / 48  # of the height, left and right, where nothing is labelled
MAPS = {  # end of the file name: function and encoding of cityscapesscripts
    "instanceIds": (createInstanceImage, "ids"),
    "labelIds": (createLabelImage, "ids"),
    "labelTrainIds": (createLabelImage, "trainIds"),
    "color": (createLabelImage, "color"),
}


class Scene(NamedTuple):
    """One wide image: BGR (H, 2H, 3) uint8, and each digit's class and mask (H, 2H) in order."""

    image: np.ndarray
    digits: list[tuple[str, np.ndarray]]


def write_layout(source: Path, out: Path, *, progress: bool = True) -> int:
    """Writes `leftImg8bit`, `gtFine` and `annotations`; returns how many images.

    Images 1 and 2 of a part of `source`, a finished digits data set, make its first wide one, 3 and
    4 the second; an odd last one stands beside the first. `gtFine` holds polygons, label ids, train
    ids, instance ids and colours, `annotations` COCO files of the instances, as MMDetection's
    converter makes them. The same source gives the same bytes. `out` is a folder that exists and
    is empty. Raises OSError where a file cannot be read or written, ValueError for an image that is
    none.
    """
    scenes = {part: _pairs(_contents(source, name)) for part, name in PARTS.items()}
    total = sum(map(len, scenes.values()))
    (out / "annotations").mkdir()
    with tqdm(total=total, desc="scenes", unit="img", mininterval=0.5, disable=not progress) as bar:
        for part, pairs in scenes.items():
            instances = _empty_coco()
            for number, pair in enumerate(pairs):
                city = CITIES[part][number % len(CITIES[part])]
                stem = f"{city}_{number:06d}_000019"
                scene = _scene(source / "images" / PARTS[part], pair)
                images = out / "leftImg8bit" / part / city
                images.mkdir(parents=True, exist_ok=True)
                write_image(images / f"{stem}_leftImg8bit.png", scene.image)
                folder = out / "gtFine" / part / city
                map_ = _write_labels(folder, stem, _polygons(scene))
                _add_to_coco(instances, f"{city}/{stem}", map_)
                bar.update()
            path = out / "annotations" / f"instancesonly_filtered_gtFine_{part}.json"
            path.write_text(json.dumps(instances))
    return total


def _contents(source: Path, part: str) -> list[tuple[dict, list[dict]]]:
    """Each image of a part with its annotations, in COCO's form."""
    content = json.loads((source / f"annotations/instances_{part}.json").read_text())
    annotations: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    return [(image, annotations[image["id"]]) for image in content["images"]]


def _pairs(images: list) -> list[tuple]:
    if len(images) % 2:
        images = [*images, images[0]]
    return list(pairwise(images))[::2]


def _scene(folder: Path, pair: tuple) -> Scene:
    halves, digits = [], []
    for side, (image, annotations) in enumerate(pair):
        halves.append(read_image(folder / image["file_name"]))
        for annotation in annotations:
            mask = np.zeros((image["height"], 2 * image["width"]), bool)
            half = slice(side * image["width"], (side + 1) * image["width"])
            mask[:, half] = coco_mask.decode(annotation["segmentation"])
            digits.append((STANDS_FOR[annotation["category_id"] - 1], mask))
    return Scene(np.hstack(halves), digits)


def _polygons(scene: Scene) -> dict[str, Any]:
    """Content of a `gtFine_polygons.json`, whose polygons are drawn in order, one on the other.

    What a digit leaves of another one beyond its largest piece, and what is seen of it through a
    third one's hole, belongs to no instance: a group, as Cityscapes calls it.
    """
    height, width = scene.image.shape[:2]
    floor, border = height - round(FLOOR_PART * height), max(1, round(BORDER_PART * height))
    truth = np.full((height, width), BACKGROUND, dtype=object)
    truth[floor:] = FLOOR
    objects = [
        _rectangle(BACKGROUND, 0, 0, width, height),
        _rectangle(FLOOR, 0, floor, width, height),
    ]
    for name, mask in scene.digits:
        truth[mask] = _group(name)
    for name, mask in scene.digits:
        largest, *pieces = _outlines(mask)
        objects.append(_object(name, largest))
        objects += [_object(_group(name), piece) for piece in pieces]
        filled = cv2.drawContours(mask.astype(np.uint8), [largest, *pieces], -1, 1, cv2.FILLED)
        hole = (filled > 0) & ~mask
        for seen in dict.fromkeys(truth[hole]):
            objects += [_object(seen, outline) for outline in _outlines(hole & (truth == seen))]
    objects += [
        _rectangle(NOTHING, 0, 0, border, height),
        _rectangle(NOTHING, width - border, 0, width, height),
    ]
    return {"imgHeight": height, "imgWidth": width, "objects": objects}


def _group(name: str) -> str:
    return f"{name}group" if name2label[name].hasInstances else name


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Outer contours of its pieces, the largest first; a pixel or two have none."""
    found = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    return sorted((o for o in found if len(o) > 2), key=cv2.contourArea, reverse=True)


def _object(name: str, outline: np.ndarray) -> dict[str, Any]:
    return {"label": name, "polygon": outline.reshape(-1, 2).tolist()}


def _rectangle(name: str, left: int, top: int, right: int, bottom: int) -> dict[str, Any]:
    """`right` and `bottom` are the first pixels that do not belong to it."""
    right, bottom = right - 1, bottom - 1
    return {"label": name, "polygon": [[left, top], [right, top], [right, bottom], [left, bottom]]}


def _write_labels(folder: Path, stem: str, polygons: dict[str, Any]) -> np.ndarray:
    """Writes the polygons and their maps; returns the map of instance ids (H, W)."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{stem}_gtFine_polygons.json"
    file.write_text(json.dumps(polygons))
    annotation = Annotation()
    annotation.fromJsonFile(str(file))
    for name, (draw, encoding) in MAPS.items():
        map_ = np.array(draw(annotation, encoding))
        # Instance ids have 32 bits in memory; in the file they have 16.
        map_ = map_.astype(np.uint16 if name == "instanceIds" else np.uint8)
        Image.fromarray(map_).save(folder / f"{stem}_gtFine_{name}.png")
    return np.array(createInstanceImage(annotation, "ids"))


def _empty_coco() -> dict[str, list]:
    things = [label for label in labels if label.hasInstances and not label.ignoreInEval]
    categories = [{"id": label.id, "name": label.name} for label in things]
    return {"images": [], "categories": categories, "annotations": []}


def _add_to_coco(coco: dict[str, list], stem: str, map_: np.ndarray) -> None:
    image_id = len(coco["images"])
    coco["images"].append(
        {
            "file_name": f"{stem}_leftImg8bit.png",
            "height": map_.shape[0],
            "width": map_.shape[1],
            "segm_file": f"{stem}_gtFine_labelIds.png",
            "id": image_id,
        }
    )
    for category, is_group, mask in _instances(map_):
        runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        coco["annotations"].append(
            {
                "iscrowd": int(is_group),
                "category_id": category,
                "bbox": coco_mask.toBbox(runs).tolist(),
                "area": int(coco_mask.area(runs)),
                "segmentation": {"size": runs["size"], "counts": runs["counts"].decode("ascii")},
                "image_id": image_id,
                "id": len(coco["annotations"]) + 1,
            }
        )


def _instances(map_: np.ndarray) -> Iterator[tuple[int, bool, np.ndarray]]:
    """Label id, whether it is a group, and mask; ids are label * 1000 + n, a group's the label."""
    for value in np.unique(map_).tolist():
        label = id2label[value // 1000 if value >= 1000 else value]
        if label.hasInstances and not label.ignoreInEval:
            yield label.id, value < 1000, map_ == value
