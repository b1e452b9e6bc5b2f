"""The digits data set as ImageNet is laid out: one digit an image, one folder a class."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from .dataset import CLASSES, read_image, write_image

PARTS = {"train": "training", "val": "validation"}
MARGIN = 0.15  # of a digit's longer side, on each side, as far as the image reaches


class Crop(NamedTuple):
    """A square of an image, in pixels, and the class of the digit in its middle."""

    image: Path
    label: str
    top: int
    left: int
    side: int


def write_layout(source: Path, out: Path, *, progress: bool = True) -> int:
    """Writes `train/<class>/NNNNNN.JPEG` and `val/<class>/NNNNNN.JPEG`; returns how many.

    Each annotated digit of `source`, a finished digits data set, becomes one square RGB image,
    JPEG quality 95, with a margin and at its size there; the number is the annotation's. Classes
    are "0".."9". The same source gives the same bytes. `out` is a folder that exists and is empty.

    Raises OSError where a file cannot be read or written, ValueError for an image that is none.
    """
    crops = {part: list(_crops(source, name)) for part, name in PARTS.items()}
    total = sum(map(len, crops.values()))
    with tqdm(total=total, desc="crops", unit="img", mininterval=0.5, disable=not progress) as bar:
        for part, found in crops.items():
            for name in CLASSES:  # also those without an image: a class is the rank of its folder
                (out / part / name).mkdir(parents=True)
            _write_part(out / part, found, bar)
    return total


def _crops(source: Path, part: str) -> Iterator[tuple[int, Crop]]:
    """Numbers and crops of one part, image by image."""
    content = json.loads((source / f"annotations/instances_{part}.json").read_text())
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        place = _square(annotation["bbox"], image["height"], image["width"])
        path = source / "images" / part / image["file_name"]
        yield annotation["id"], Crop(path, names[annotation["category_id"]], *place)


def _square(box: list[float], height: int, width: int) -> tuple[int, int, int]:
    """Top, left and side of a box (x, y, width, height) with its margin, inside the image."""
    x, y, w, h = box
    side = min(round(max(w, h) * (1 + 2 * MARGIN)), height, width)
    top, left = round(y + (h - side) / 2), round(x + (w - side) / 2)
    return min(max(top, 0), height - side), min(max(left, 0), width - side), side


def _write_part(folder: Path, crops: list[tuple[int, Crop]], bar: tqdm) -> None:
    path: Path | None = None
    image: Any = None
    for number, crop in crops:
        if crop.image != path:
            path, image = crop.image, read_image(crop.image)
        square = image[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
        write_image(folder / crop.label / f"{number:06d}.JPEG", square)
        bar.update()
