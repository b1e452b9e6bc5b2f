"""Files in COCO's format, of every kind that exports have, and their objects as detections."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycocotools.mask

from elsa_core.data.coco_rules import has_area

SIZES = [(240, 200), (64, 48), (33, 90)]
NAMES = ("zebra", "ape", "Ächse")


def rectangle(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def as_rle(polygon, size, compressed):
    """RLE in one of COCO's two forms."""
    width, height = size
    (rle,) = pycocotools.mask.frPyObjects([polygon], height, width)
    counts = rle["counts"].decode()
    if not compressed:
        flat = pycocotools.mask.decode(rle).ravel(order="F")
        edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
        counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": [height, width], "counts": counts}


def content(sizes=SIZES, objects=((2, 2), (130, 120), (40, 40), (9, 30)), seed=0):
    """Small, medium and large objects, some of each category, some beside each other.

    Args:
        sizes: (width, height) of each image.
        objects: (width, height), those that an image is large enough for; no two overlap by half.
    """
    random = np.random.default_rng(seed)
    images, annotations = [], []
    for number, (width, height) in enumerate(sizes, start=1):
        image = {"id": number, "file_name": f"{number}.jpg", "width": width, "height": height}
        images.append(image)
        left = 0.0
        for w, h in objects:
            if left + w > width or h > height:
                continue
            box = [round(left, 2), round(float(random.uniform(0, height - h)), 2), w, h]
            left += 0.7 * w
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": len(annotations) % len(NAMES) + 1,
                    "bbox": box,
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [rectangle(*box)],
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    return {"images": images, "categories": categories, "annotations": annotations}


def grid(side=20, pitch=12):
    """side x side objects in one image, more than 100 of each category."""
    made = content([(side * pitch, side * pitch)], objects=[(10, 10)])
    (first,) = made["annotations"]
    boxes = [[pitch * x, pitch * y, 10, 10] for x in range(side) for y in range(side)]
    made["annotations"] = [
        {
            **first,
            "id": i,
            "bbox": box,
            "segmentation": [rectangle(*box)],
            "category_id": i % len(NAMES) + 1,
        }
        for i, box in enumerate(boxes, start=1)
    ]
    return made


def renamed(what, new):
    """Gives the entries of a list other ids, and what refers to them too."""

    def change(coco):
        key = {"images": "image_id", "categories": "category_id"}.get(what)
        ids = {one["id"]: new(one["id"]) for one in coco[what]}
        for one in coco[what]:
            one["id"] = ids[one["id"]]
        for one in coco["annotations"] if key else []:
            one[key] = ids[one[key]]

    return change


def all_renamed(new):
    def change(coco):
        for what in ("images", "categories", "annotations"):
            renamed(what, new)(coco)

    return change


def masks(compressed):
    def change(coco):
        sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
        for one in coco["annotations"]:
            (polygon,) = one["segmentation"]
            one["segmentation"] = as_rle(polygon, sizes[one["image_id"]], compressed)

    return change


def crowds(coco):
    for compressed in (True, False):
        image = coco["images"][compressed]
        size = image["width"], image["height"]
        box = [1, 1, size[0] - 2, size[1] - 3]
        coco["annotations"].insert(
            0,
            {
                **coco["annotations"][0],
                "id": 900 + compressed,
                "image_id": image["id"],
                "bbox": box,
                "iscrowd": 1,
                "segmentation": as_rle(rectangle(*box), size, compressed),
            },
        )


def parts(coco):
    for one in coco["annotations"]:
        x, y, w, h = one["bbox"]
        one["segmentation"] = [
            [x, y],
            rectangle(x, y, w / 3, h),
            [x, y, x + w, y + h],
            rectangle(x + w / 2, y, w / 2, h),
        ]


def each(**values):
    """Changes all annotations; a value of ... takes the key away."""

    def change(coco):
        for one in coco["annotations"]:
            one.update(values)
            for key in [key for key, value in values.items() if value is ...]:
                del one[key]

    return change


def names(coco):
    for image, name in zip(coco["images"], ("a/ü ß.jpg", "b/c/日本.JPG", "b/x.y.png"), strict=True):
        image["file_name"] = name


def twice(coco):
    """Each object a second time, an image's and its file's names too."""
    coco["annotations"] += [
        {**one, "id": one["id"] + 100, "area": one["area"]} for one in coco["annotations"]
    ]
    shared = ("file_name", "width", "height")
    coco["images"][1] |= {key: coco["images"][0][key] for key in shared}


KINDS = {
    "plain": lambda coco: None,
    "annotation ids from 0": renamed("annotations", lambda i: i - 1),
    "all ids from 0": all_renamed(lambda i: i - 1),
    "ids with gaps": all_renamed(lambda i: i * i * 10**9 + 5),
    "ids of text": all_renamed(lambda i: f"id {9 - i}"),
    "categories backwards": lambda coco: coco["categories"].reverse(),
    "an unused category": lambda coco: coco["categories"].insert(1, {"id": 0, "name": "none"}),
    "crowds": crowds,
    "compressed RLE": masks(True),
    "uncompressed RLE": masks(False),
    "polygons in parts": parts,
    "one object": lambda coco: coco.update(annotations=coco["annotations"][:1]),
    "names": names,
    "no iscrowd, no area": each(iscrowd=..., area=...),
    "iscrowd and area null": each(iscrowd=None, area=None),
    "a difficult object": lambda coco: coco["annotations"][0].update(ignore=1),
    "twice": twice,
    "boxes without area": lambda coco: coco["annotations"][1].update(bbox=[5, 5, 0, 3]),
    "boxes over the edge": lambda coco: coco["annotations"][1].update(bbox=[-50, 9, 130, 120.5]),
    "400 objects": lambda coco: coco.update(grid()),
}


@dataclass
class Detection:
    """What a model would give for an object: box [x1, y1, x2, y2] and mask [H, W]."""

    image: object
    name: str
    box: list
    mask: np.ndarray | None
    score: float


def truth_of(coco, task, seed=0):
    """Each object of a file as a detection, with random scores, best first.

    Reads the file on its own: what the packages would leave out without a word shows.
    """
    random = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    called = {one["id"]: one["name"] for one in coco["categories"]}
    found = []
    for one in coco["annotations"]:
        x, y, w, h = one["bbox"]
        if one.get("iscrowd") or one.get("ignore") or not has_area(one["bbox"]):
            continue
        mask = None
        if task == "segm":
            mask = mask_of(one["segmentation"], *sizes[one["image_id"]])
            if not mask.any():
                continue
        box, score = [x, y, x + w, y + h], float(random.uniform(0.1, 1))
        found.append(Detection(one["image_id"], called[one["category_id"]], box, mask, score))
    return sorted(found, key=lambda one: -one.score)


def mask_of(segmentation, height, width):
    if isinstance(segmentation, list):
        good = [part for part in segmentation if len(part) >= 6 and len(part) % 2 == 0]
        segmentation = pycocotools.mask.merge(pycocotools.mask.frPyObjects(good, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = pycocotools.mask.frPyObjects(segmentation, height, width)
    return pycocotools.mask.decode(segmentation).astype(bool)


def write(folder: Path, coco, encoding="utf-8"):
    """The file, and an empty file for each image."""
    for image in coco["images"]:
        name = image.get("file_name") if isinstance(image, dict) else None
        if name and isinstance(name, str):
            path = folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    file = folder / "annotations.json"
    file.write_text(json.dumps(coco, ensure_ascii=False), encoding=encoding)
    return file
