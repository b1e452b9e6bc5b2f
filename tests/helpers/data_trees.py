"""Small data sets in the official layouts, and those layouts with counts that fit them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pycocotools.mask
from PIL import Image

from elsa_tools.data.layout import LAYOUTS, Annotations, Part

SIZE = (24, 16)


def shrunk(name):
    """The layout of a data set, expecting 2 files (ImageNet: 2 classes of 2) of each kind."""
    layout = LAYOUTS[name]
    imagenet = name == "imagenet"

    def smaller(part: Part) -> Part:
        changes = {"count": 4 if imagenet else 2}
        if part.nested:
            changes["subfolders"] = 2 if imagenet else 1
        if part.each is not None:
            changes["each"] = (2, 2)
        return dataclasses.replace(part, **changes)

    def shorter(annotations: Annotations) -> Annotations:
        return dataclasses.replace(annotations, count=2)

    return dataclasses.replace(
        layout,
        parts=tuple(map(smaller, layout.parts)),
        annotations=tuple(map(shorter, layout.annotations)),
    )


def image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*SIZE[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG" if path.suffix != ".png" else "PNG")


def labels(path: Path, values=(0, 1, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.resize(np.asarray(values, dtype=np.uint8), SIZE[::-1])
    Image.fromarray(pixels).save(path)


def coco_content(names, categories):
    """Each image has a box with a polygon, the first one also a crowd in RLE."""
    width, height = SIZE
    crowd = np.zeros((height, width), dtype=np.uint8, order="F")
    crowd[2:9, 3:20] = 1
    rle = pycocotools.mask.encode(crowd)
    rle["counts"] = rle["counts"].decode()
    content = {
        "images": [
            {"id": i, "file_name": name, "width": width, "height": height}
            for i, name in enumerate(names)
        ],
        "categories": [{"id": i, "name": f"kind {i}"} for i in range(1, categories + 1)],
        "annotations": [],
    }
    polygon = [2, 2, 12, 2, 12, 10, 2, 10]
    for number in range(max(categories, len(names))):
        one = {"id": number + 1, "image_id": number % len(names), "iscrowd": 0}
        one |= {"category_id": number % categories + 1, "area": 80, "bbox": [2, 2, 10, 8]}
        content["annotations"].append({**one, "segmentation": [polygon]})
    content["annotations"][0] |= {"segmentation": rle, "iscrowd": 1, "area": int(crowd.sum())}
    return content


def coco(root: Path) -> None:
    for split in ("train2017", "val2017"):
        names = [f"{number:012d}.jpg" for number in (7, 9)]
        for number, name in enumerate(names):
            image(root / split / name, number)
        file = root / f"annotations/instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(coco_content(names, 80)))


def ade20k(root: Path) -> None:
    for split in ("training", "validation"):
        for number in (1, 2):
            stem = f"ADE_{split}_{number:08d}"
            image(root / f"images/{split}/{stem}.jpg", number)
            labels(root / f"annotations/{split}/{stem}.png", (0, 1, 150))


def imagenet(root: Path) -> None:
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            for number in (1, 2):
                image(root / split / name / f"{name}_{number}.JPEG", number)


def cityscapes(root: Path) -> None:
    """As downloaded: polygons, and the maps that cityscapesscripts draws from them."""
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
    from cityscapesscripts.preparation.json2labelImg import json2labelImg

    width, height = SIZE
    objects = [
        {"label": "road", "polygon": [[0, 8], [width, 8], [width, height], [0, height]]},
        {"label": "car", "polygon": [[2, 6], [8, 6], [8, 12], [2, 12]]},
        {"label": "car", "polygon": [[10, 6], [14, 6], [14, 11], [10, 11]]},
        {"label": "persongroup", "polygon": [[16, 3], [22, 3], [22, 12], [16, 12]]},
        {"label": "license plate", "polygon": [[4, 10], [6, 10], [6, 11], [4, 11]]},
    ]
    for split, city in (("train", "aachen"), ("val", "lindau")):
        for number in (0, 1):
            stem = f"{city}/{city}_{number:06d}_000019"
            image(root / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", number)
            polygons = root / f"gtFine/{split}/{stem}_gtFine_polygons.json"
            polygons.parent.mkdir(parents=True, exist_ok=True)
            content = {"imgWidth": width, "imgHeight": height, "objects": objects[number:]}
            polygons.write_text(json.dumps(content))
            stem = str(polygons).removesuffix("polygons.json")
            json2labelImg(str(polygons), f"{stem}labelIds.png")
            # Not by json2instanceImg: Pillow 13 writes no PNG of 32 bits a pixel.
            annotation = Annotation()
            annotation.fromJsonFile(str(polygons))
            ids = np.asarray(createInstanceImage(annotation, "ids"), dtype=np.uint16)
            Image.fromarray(ids).save(f"{stem}instanceIds.png")


WRITERS = {"coco": coco, "ade20k": ade20k, "cityscapes": cityscapes, "imagenet": imagenet}
