"""One small data set in each layout that `elsa_tools.fit.sources` reads."""

import json
import xml.etree.ElementTree as ET
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from skimage.measure import find_contours

SIZE = (96, 64)
CLASSES = ("square", "tall")
TRAIN, VAL = range(6), range(6, 8)


def objects(number):
    """The objects (class, left, top, width, height) of an image; the last image has none."""
    if number == 7:
        return []
    left = 4 + 3 * number
    found = [(0, left, 6, 24, 24), (1, left + 40, 10, 16, 40)]
    return found if number else found[:1]


def image(path, number=0):
    """Grey, with its objects in red and blue; each number has pixels of its own."""
    made = Image.new("RGB", SIZE, (90 + number, 90, 90))
    draw = ImageDraw.Draw(made)
    for label, x, y, w, h in objects(number):
        draw.rectangle((x, y, x + w - 1, y + h - 1), ((200, 40, 40), (40, 40, 200))[label])
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path, quality=95)


def label_map(path, number=0):
    """Background 0, then the classes."""
    values = np.zeros(SIZE[::-1], np.uint8)
    for label, x, y, w, h in objects(number):
        values[y : y + h, x : x + w] = label + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def name_of(number):
    return f"{'abcdefgh'[number]}.jpg"


def corners(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def coco(numbers, file_name=name_of, masks=True, categories=None):
    images = [
        {"id": 10 + n, "file_name": file_name(n), "width": SIZE[0], "height": SIZE[1]}
        for n in numbers
    ]
    categories = categories or [{"id": 3 + i, "name": name} for i, name in enumerate(CLASSES)]
    annotations = []
    for n in numbers:
        for label, *box in objects(n):
            one = {"id": len(annotations) + 1, "image_id": 10 + n, "iscrowd": 0, "bbox": box}
            one |= {"category_id": categories[label - 2]["id"], "area": box[2] * box[3]}
            annotations.append({**one, "segmentation": [corners(*box)] if masks else []})
    return {"images": images, "annotations": annotations, "categories": categories}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def roboflow(root, masks=True):
    """Also with Roboflow's category that groups the others."""
    group = [{"id": 0, "name": "shapes", "supercategory": "none"}]
    group += [
        {"id": i, "name": name, "supercategory": "shapes"} for i, name in enumerate(CLASSES, 1)
    ]
    for part, numbers in (("train", TRAIN), ("valid", VAL)):
        for n in numbers:
            image(root / part / name_of(n), n)
        content = coco(numbers, masks=masks, categories=group)
        write(root / part / "_annotations.coco.json", content)


def cvat(root):
    for n in (*TRAIN, *VAL):
        image(root / "images/default" / name_of(n), n)
    write(root / "annotations/instances_default.json", coco((*TRAIN, *VAL)))


def label_studio(root):
    for n in (*TRAIN, *VAL):
        image(root / "images" / f"0a1b-{name_of(n)}", n)
    names = "../../label-studio/data/media/upload/1/0a1b-{}", "images\\0a1b-{}"
    content = coco((*TRAIN, *VAL), lambda n: names[n % 2].format(name_of(n)))
    write(root / "result.json", content)


def single_json(root):
    for n in (*TRAIN, *VAL):
        image(root / name_of(n), n)
    write(root / "annotations.json", coco((*TRAIN, *VAL)))


def digits(root):
    """As tools/make_digits.py writes it, also with label maps, in which 0 is unused."""
    for part, numbers in (("training", TRAIN), ("validation", VAL)):
        for n in numbers:
            image(root / f"images/{part}" / name_of(n), n)
        write(root / f"annotations/instances_{part}.json", coco(numbers))


def yolo_lines(number, polygons):
    lines = []
    for label, x, y, w, h in objects(number):
        values = corners(x, y, w, h) if polygons else [x + w / 2, y + h / 2, w, h]
        scaled = [value / SIZE[place % 2] for place, value in enumerate(values)]
        lines.append(" ".join([str(label), *(f"{value:.6f}" for value in scaled)]))
    return "\n".join(lines)


def yolo(root, polygons=True, mixed=False):
    """As Ultralytics wants it. The image without objects has no label file."""
    for part, numbers in (("train", TRAIN), ("val", VAL)):
        for n in numbers:
            image(root / f"images/{part}" / name_of(n), n)
            if lines := yolo_lines(n, polygons and not (mixed and n)):
                write(root / f"labels/{part}" / f"{Path(name_of(n)).stem}.txt", lines)
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    write(root / "data.yaml", f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")


def yolo_boxes(root):
    yolo(root, polygons=False)


def voc_xml(number, first=1):
    root = ET.Element("annotation")
    ET.SubElement(root, "filename").text = name_of(number)
    size = ET.SubElement(root, "size")
    for key, value in zip(("width", "height", "depth"), (*SIZE, 3), strict=True):
        ET.SubElement(size, key).text = str(value)
    for label, x, y, w, h in objects(number):
        one = ET.SubElement(root, "object")
        ET.SubElement(one, "name").text = CLASSES[label]
        box = ET.SubElement(one, "bndbox")
        edges = (x + first, y + first, x + w, y + h)
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True):
            ET.SubElement(box, key).text = str(value)
    return ET.tostring(root, encoding="unicode")


def voc(root):
    for part, numbers in (("train", TRAIN), ("val", VAL)):
        for n in numbers:
            image(root / "JPEGImages" / name_of(n), n)
            write(root / "Annotations" / f"{Path(name_of(n)).stem}.xml", voc_xml(n))
        stems = "\n".join(Path(name_of(n)).stem for n in numbers)
        write(root / f"ImageSets/Main/{part}.txt", stems + "\n")


def label_maps(root, images="images", maps="masks"):
    for n in (*TRAIN, *VAL):
        image(root / images / name_of(n), n)
        label_map(root / maps / f"{Path(name_of(n)).stem}.png", n)
    write(root / "classes.txt", "\n".join(CLASSES) + "\n")


def outline(mask):
    """One polygon around all parts of a mask, on the edges of its pixels to within half of one."""
    parts = [part[:, ::-1] - 0.5 for part in find_contours(np.pad(mask, 1), 0.5)]
    start = parts[0][:1]
    return np.concatenate([edge for part in parts for edge in (part, part[:1], start)]).ravel()


def yolo_copy(source, root, polygons=True):
    """A data set in the layout of the digits in YOLO's format, with links to the images."""
    for part in ("training", "validation"):
        with redirect_stdout(StringIO()):
            found = COCO(str(source / f"annotations/instances_{part}.json"))
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "images" / part).symlink_to((source / "images" / part).absolute())
        for image in found.imgs.values():
            lines, size = [], (image["width"], image["height"])
            for one in found.imgToAnns[image["id"]]:
                x, y, w, h = one["bbox"]
                values = [x + w / 2, y + h / 2, w, h]
                if polygons:
                    values = outline(found.annToMask(one))
                scaled = [f"{value / size[n % 2]:.6f}" for n, value in enumerate(values)]
                lines.append(" ".join([str(one["category_id"] - 1), *scaled]))
            write(root / "labels" / part / f"{Path(image['file_name']).stem}.txt", "\n".join(lines))
    names = json.dumps([one["name"] for one in found.cats.values()])
    write(root / "data.yaml", f"train: images/training\nval: images/validation\nnames: {names}\n")


INSTANCES = {
    "roboflow": roboflow,
    "cvat": cvat,
    "label_studio": label_studio,
    "single_json": single_json,
    "digits": digits,
    "yolo": yolo,
}
BOXES = {"yolo_boxes": yolo_boxes, "voc": voc}
SEMANTIC = {"label_maps": label_maps}
LAYOUTS = {**INSTANCES, **BOXES, **SEMANTIC}
