"""Files in COCO's format with random damage, and what the checker says of them."""

import contextlib
import copy
import io
import json
import os
import random
import re
import tempfile

import numpy as np
import pycocotools.mask
from PIL import Image

from elsa_core.runtime.errors import UsageError
from elsa_tools.data import cli

SIZES = [(64, 48), (48, 64), (40, 40)]
NAMES = ["ape", "zebra", "Ächse"]
DIGITS = int("7" * 400)
VALUES = [
    *(None, True, False, "", "a", "1", "ä日", "\ud800", "\x1b[2J", "a\0b", "../x.jpg", "/x.jpg"),
    *(0, 1, -1, 2, 3, 7, 40, 64, 96, 10**4, 65_500, 65_501, 2**31, 2**32, 2**33, 2**63, 2**64),
    *(1e6, 1e9, 1e18, 1e29, 1e30, 1e300, -1e300, 1e-9, 0.5, 1.5, DIGITS, -DIGITS),
    *(float("nan"), float("inf"), -float("inf")),
    *([], {}, [[]], [{}], [1], [1, 2, 3, 4], [0, 0, 1e9, 1e9], [-5, -5, 900, 900], [[1, 2]]),
    *([[1, 1, 9, 1, 9, 9]], [[1e9] * 6], [["a"] * 6], [[DIGITS] * 6], [[0, 0, 500, 500] * 3000]),
    *({"size": [48, 64], "counts": [3072]}, {"size": ["a", "b"], "counts": [1]}),
    *({"size": [48, 64], "counts": "o" * 9000}, {"counts": "`1"}, {"size": [48, 64], "counts": ""}),
    *({"a": {"b": [1]}}, json.loads("[" * 120 + "]" * 120), list(range(5000)), "x" * 5000),
]
KEYS = ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation"]
KEYS += ["file_name", "width", "height", "name", "keypoints", "segments_info", "images", "counts"]
KEYS += ["annotations", "categories", "size", "supercategory", "caption", "num_keypoints"]


SOUND = 10  # a seed


def valid(choice):
    """2 to 4 images with objects in all forms of masks, and a crowd."""
    images, annotations = [], []
    for number in range(1, choice.randint(2, 4) + 1):
        width, height = choice.choice(SIZES)
        image = {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        images.append(image)
        for form in choice.sample(["polygon", "list", "text", "crowd"], choice.randint(1, 3)):
            x, y = choice.randint(0, width - 12), choice.randint(0, height - 12)
            w, h = choice.randint(5, 12), choice.randint(5, 12)
            mask = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            if form != "polygon":
                mask = encoded(mask, width, height, form == "list")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": choice.randint(1, 3),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(form == "crowd" and len(annotations) > 0),
                    "segmentation": mask,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def encoded(polygons, width, height, as_list):
    (rle,) = pycocotools.mask.frPyObjects(polygons, height, width)
    if not as_list:
        return {"size": [height, width], "counts": rle["counts"].decode()}
    flat = pycocotools.mask.decode(rle).ravel(order="F")
    edges = [0, *np.flatnonzero(np.diff(flat, prepend=0)), flat.size]
    return {"size": [height, width], "counts": np.diff(edges).tolist()}


def places(node):
    """(container, key) of every value in nested dicts and lists."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, (dict, list)) and len(str(type(value))) and len(value) < 100:
            yield from places(value)


def mutate(content, choice):
    """Changes one value, or one entry, anywhere in the content."""
    node, key = choice.choice(list(places(content)))
    what = choice.choice(["value"] * 5 + ["scale", "delete", "add", "again", "swap", "all"])
    if what == "value":
        node[key] = copy.deepcopy(choice.choice(VALUES))
    elif what == "scale" and type(node[key]) in (int, float) and abs(node[key]) < 1e9:
        node[key] = choice.choice([-node[key], node[key] * 1e5, node[key] + 0.25, node[key] * 9])
    elif what == "delete":
        del node[key]
    elif what == "add" and isinstance(node, dict):
        node[choice.choice(KEYS)] = copy.deepcopy(choice.choice(VALUES))
    elif what == "again" and isinstance(node, list):
        node.insert(choice.randint(0, len(node)), copy.deepcopy(node[key]))
    elif what == "swap":
        other, name = choice.choice(list(places(content)))
        node[key] = copy.deepcopy(other[name])
    elif what == "all":  # one key of all entries of a list
        entries = content.get(choice.choice(["images", "annotations", "categories"]))
        name, value = choice.choice(KEYS), choice.choice([*VALUES, "delete"])
        for one in entries if isinstance(entries, list) else []:
            if isinstance(one, dict):
                one[name] = copy.deepcopy(value)
                if value == "delete":
                    del one[name]


def mutated(seed):
    """The bytes of a file that is often, not always, damaged, and sizes of its images by name."""
    choice = random.Random(seed)
    content = valid(choice)
    sizes = {one["file_name"]: (one["width"], one["height"]) for one in content["images"]}
    for _ in range(choice.choice([0, 1, 1, 1, 2, 2, 3])):
        if list(places(content)):
            mutate(content, choice)
    if choice.random() < 0.02:
        content = choice.choice(VALUES)
    data = json.dumps(content, ensure_ascii=choice.random() < 0.5)
    encoding = choice.choices(["utf-8", "utf-8-sig", "utf-16", "latin-1"], [40, 2, 1, 1])[0]
    errors = "surrogatepass" if encoding.startswith("utf") else "replace"
    return damaged(data.encode(encoding, errors), choice), sizes


def damaged(data, choice):
    """Sometimes not JSON any more."""
    what, place = choice.random(), choice.randint(0, len(data))
    if what < 0.85:
        return data
    inserted = choice.choice([b"[" * 100_000, b"9" * 5000, b'{"a":' * 3000, b"\0", b"\xff", b","])
    if what < 0.9:
        return data[:place]
    if what < 0.95:
        return data[:place] + inserted + data[place:]
    return data[:place] + bytes([choice.randint(0, 255)]) + data[place + 1 :]


def written(seed, folder="."):
    """Writes annotations.json and images/."""
    data, sizes = mutated(seed)
    with open(f"{folder}/annotations.json", "wb") as file:
        file.write(data)
    os.mkdir(f"{folder}/images")
    for name, size in sizes.items():
        Image.new("RGB", size, (seed % 256, 99, 30)).save(f"{folder}/images/{name}")


def warmed_up(case):
    """Runs a case with an undamaged file, which imports what the others need."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            case(SOUND)
        finally:
            os.chdir(before)
    return case


def compare(start, masks, rle_is_refused=False):
    """`start` reads the file of a case, or refuses in one sentence; the checker has to agree."""
    errors, warnings = checked()
    try:
        start()
    except UsageError as error:
        sentence = str(error)
        assert "\n" not in sentence and len(sentence) < 1500 and sentence.isprintable(), sentence
        print(sentence)
        assert errors or "no-masks" in warnings or rle_is_refused, sentence
        return
    assert not errors or not masks, errors


def checked():
    """Rules of the errors and of the warnings that `prepare_data check` finds in that file."""
    arguments = ["check", "--annotations", "annotations.json", "--images", "images"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        status = cli.main([*arguments, "--sample", "all", "--json", "report.json"])
    text = said.getvalue()
    text.encode()
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f]", text), repr(text)
    assert len(text) < 30_000, len(text)
    with open("report.json") as file:
        record = json.load(file)
    findings = [one for report in record["reports"] for one in report["findings"]]
    errors = {one["rule"] for one in findings if one["level"] == "error"}
    assert status == bool(errors) == (not record["complete"]), (status, errors)
    return errors, {one["rule"] for one in findings} - errors
