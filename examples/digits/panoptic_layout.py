"""The digits data set in COCO's panoptic format: digits are things, the photograph is stuff."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from elsa_core.data.panoptic import VOID, to_colours

from .painter import PARTS

BACKGROUND = {"id": 11, "name": "background", "isthing": 0}


def write_layout(source: Path, out: Path, *, progress: bool = True) -> int:
    """Writes `images` and `annotations`; returns how many images.

    `images` and `annotations/instances_PART.json` are those of `source`, a finished digits data
    set. `annotations/panoptic_PART.json` names the PNG files of `annotations/panoptic_PART`. `out`
    is a folder that exists and is empty. Raises OSError where a file cannot be read or written.
    """
    shutil.copytree(source / "images", out / "images")
    (out / "annotations").mkdir()
    total = 0
    for part in PARTS:
        text = (source / f"annotations/instances_{part}.json").read_text()
        (out / f"annotations/instances_{part}.json").write_text(text)
        content = json.loads(text)
        panoptic = write_maps(content, out / f"annotations/panoptic_{part}", progress)
        (out / f"annotations/panoptic_{part}.json").write_text(json.dumps(panoptic))
        total += len(content["images"])
    return total


def write_maps(content: dict, folder: Path, progress: bool = False) -> dict[str, Any]:
    """Writes the PNG files of a COCO file of digits to a new folder; returns the panoptic file."""
    folder.mkdir()
    entries = []
    for image in tqdm(content["images"], desc=folder.name, unit="img", disable=not progress):
        digits = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        entries.append(_write_image(folder, image, digits))
    things = [{**one, "isthing": 1} for one in content["categories"]]
    categories = [*things, BACKGROUND]
    return {"images": content["images"], "annotations": entries, "categories": categories}


def _write_image(folder: Path, image: dict, digits: list[dict]) -> dict[str, Any]:
    """Writes the PNG of an image; returns its annotation. Masks of digits do not overlap."""
    ids = np.full((image["height"], image["width"]), len(digits) + 1)
    categories = [*(digit["category_id"] for digit in digits), BACKGROUND["id"]]
    for number, digit in enumerate(digits, 1):
        ids[coco_mask.decode(digit["segmentation"]) > 0] = number
    segments = []
    for number, category in enumerate(categories, 1):
        rows, columns = np.nonzero(ids == number)
        if not len(rows):
            continue
        left, top = int(columns.min()), int(rows.min())
        segments.append(
            {
                "id": number,
                "category_id": category,
                "iscrowd": 0,
                "area": len(rows),
                "bbox": [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top],
            }
        )
    assert VOID not in ids
    name = Path(image["file_name"]).with_suffix(".png").name
    Image.fromarray(to_colours(ids)).save(folder / name)
    return {"image_id": image["id"], "file_name": name, "segments_info": segments}
