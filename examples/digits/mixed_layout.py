"""The digits data set with validation images of many sizes and kinds of file."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from .dataset import JPEG_QUALITY

TRAINING, VALIDATION = "training", "validation"
# Columns and rows of digits images that one image consists of, and their scale. The numbers of
# sizes and of kinds have no common factor: each kind comes in each size.
SIZES = ((1, 1, 1.0), (2, 1, 1.0), (1, 2, 0.8), (2, 2, 0.6), (3, 1, 0.7), (1, 1, 1.3), (1, 3, 0.55))
CROWD = (12, 12, 0.25)  # some 400 digits
CROWD_EVERY = 20  # images, of which the first is a crowd
# EXIF orientation -> what turns the picture as it is seen into the one that is stored.
TURNS = {
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
    3: Image.Transpose.ROTATE_180,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    7: Image.Transpose.TRANSVERSE,
}


class Scene(NamedTuple):
    """RGB [H, W, 3], label map [H, W], both uint8; annotation and mask [H, W] of each digit."""

    image: np.ndarray
    labels: np.ndarray
    digits: list[tuple[dict, np.ndarray]]


def write_layout(source: Path, out: Path, *, progress: bool = True) -> int:
    """Writes the standard layout with a mixed validation part; returns how many images.

    Image k of the validation part consists of one or more images of `source`, a finished digits
    data set, that follow each other from k on; it has size k and kind k of those that this module
    lists, in turn, but that every 20th is a crowd of 144 small images. Sizes and masks in the COCO
    file are those of the picture as it is seen, with its EXIF orientation. The training part is
    that of `source`. The same source gives the same bytes. `out` is a folder that exists and is
    empty. Raises OSError where a file cannot be read or written.
    """
    for folder in ("images", "annotations"):
        shutil.copytree(source / folder / TRAINING, out / folder / TRAINING)
        (out / folder / VALIDATION).mkdir()
    name = f"annotations/instances_{TRAINING}.json"
    shutil.copy(source / name, out / name)
    coco = json.loads((source / f"annotations/instances_{VALIDATION}.json").read_text())
    tiles = list(_tiles(source, coco))
    images: list[dict] = []
    annotations: list[dict] = []
    for number in tqdm(range(len(tiles)), "mixed", unit="img", disable=not progress):
        crowd = number % CROWD_EVERY == 0
        scene = _scene(tiles, number, *(CROWD if crowd else SIZES[number % len(SIZES)]))
        kind = "colour" if crowd else list(KINDS)[number % len(KINDS)]
        image_id = number + 1
        path = out / "images" / VALIDATION / f"{image_id:06d}{KINDS[kind][0]}"
        KINDS[kind][1](Image.fromarray(scene.image), path, number)
        Image.fromarray(scene.labels).save(out / "annotations" / VALIDATION / f"{image_id:06d}.png")
        height, width = scene.labels.shape
        size = {"width": width, "height": height}
        images.append({"id": image_id, "file_name": path.name, **size, "kind": kind})
        annotations += _annotations(scene, image_id, len(annotations) + 1)
    coco |= {"images": images, "annotations": annotations}
    (out / f"annotations/instances_{VALIDATION}.json").write_text(json.dumps(coco))
    training = json.loads((out / name).read_text())["images"]
    return len(training) + len(images)


def _tiles(source: Path, coco: dict) -> Iterator[Scene]:
    for image in coco["images"]:
        with Image.open(source / "images" / VALIDATION / image["file_name"]) as file:
            pixels = np.asarray(file.convert("RGB"))
        stem = Path(image["file_name"]).stem
        with Image.open(source / "annotations" / VALIDATION / f"{stem}.png") as file:
            labels = np.asarray(file)
        mine = [one for one in coco["annotations"] if one["image_id"] == image["id"]]
        digits = [(one, coco_mask.decode(one["segmentation"])) for one in mine]
        yield Scene(pixels, labels, digits)


def _scene(tiles: list[Scene], first: int, columns: int, rows: int, scale: float) -> Scene:
    """Images from `first` on, row by row; after the last one comes the first one."""
    side = round(scale * tiles[0].labels.shape[0])
    image = np.empty((rows * side, columns * side, 3), np.uint8)
    labels = np.empty(image.shape[:2], np.uint8)
    digits = []
    for place in range(columns * rows):
        tile = tiles[(first + place) % len(tiles)]
        top, left = side * (place // columns), side * (place % columns)
        window = slice(top, top + side), slice(left, left + side)
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        image[window] = cv2.resize(tile.image, (side, side), interpolation=method)
        labels[window] = _resized(tile.labels, side)
        for annotation, mask in tile.digits:
            whole = np.zeros(labels.shape, np.uint8)
            whole[window] = _resized(mask, side)
            digits.append((annotation, whole))
    return Scene(image, labels, digits)


def _resized(map_: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(map_, (side, side), interpolation=cv2.INTER_NEAREST)


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    result: list[dict] = []
    for annotation, mask in scene.digits:
        run = coco_mask.encode(np.asfortranarray(mask))
        area = int(coco_mask.area(run))
        if area == 0:  # too thin for its smaller image
            continue
        new: dict[str, Any] = {"id": first_id + len(result), "image_id": image_id}
        new["segmentation"] = {"size": run["size"], "counts": run["counts"].decode("ascii")}
        result.append({**annotation, **new, "area": area, "bbox": coco_mask.toBbox(run).tolist()})
    return result


def _transparent(image: Image.Image, path: Path, number: int) -> None:
    alpha = np.random.default_rng(number).integers(0, 256, image.size[::-1], dtype=np.uint8)
    image.putalpha(Image.fromarray(alpha))
    image.save(path)


def _turned(image: Image.Image, path: Path, number: int) -> None:
    """Each of the seven orientations in turn."""
    orientation = list(TURNS)[number // len(KINDS) % len(TURNS)]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.transpose(TURNS[orientation]).save(path, quality=JPEG_QUALITY, exif=exif)


def _deep(image: Image.Image, path: Path, number: int) -> None:
    """16 bits of grey, the low byte is noise."""
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    noise = np.random.default_rng(number).integers(0, 256, grey.shape, dtype=np.uint16)
    Image.fromarray(grey * 256 + noise).save(path)


# Name in the COCO file -> ending and writer of (image, path, number).
KINDS: dict[str, tuple[str, Callable[[Image.Image, Path, int], None]]] = {
    "colour": (".jpg", lambda image, path, _: image.save(path, quality=JPEG_QUALITY)),
    "grey": (".png", lambda image, path, _: image.convert("L").save(path)),
    "rgba": (".png", _transparent),
    "turned": (".jpg", _turned),
    "16-bit": (".png", _deep),
}
