"""Damage to the files of a data set, and the end of the loaders that have met it."""

import gc
import json

import numpy as np
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


def end_workers():
    """Ends the workers of loaders that a failed run keeps alive in a cycle of references.

    The garbage collector finalizes a loader's queues before the loader, whose workers then wait in
    vain to be told to end: until it gives up, 10 seconds later.
    """
    for one in gc.get_objects():
        if type(one) is _MultiProcessingDataLoaderIter:
            one._shutdown_workers()


# All files of a folder, so that the first batch meets one.


def cut_all(folder):
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_images(folder):
    for file in folder.iterdir():
        file.write_bytes(b"<html>404</html>")


def shrink(folder):
    for file in folder.iterdir():
        Image.open(file).resize((40, 50)).save(file)


def colour(folder):
    for file in folder.iterdir():
        Image.new("RGB", (96, 96)).save(file)


def paint(value, size=(96, 96)):
    def spoil(folder):
        for file in folder.iterdir():
            Image.fromarray(np.full(size, value, dtype=np.uint8)).save(file)

    return spoil


def edit(root, part, change):
    """Changes the content of the annotation file of a part, which is returned."""
    file = root / f"annotations/instances_{part}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def _annotation(**values):
    return lambda content: content["annotations"][3].update(values)


# (change, what is said of the file), the second with {} for what trains without masks
CONTRADICTIONS = [
    (_annotation(image_id=999), "belongs to image 999, which is not in the file"),
    (_annotation(category_id=11), "has category 11, which is not in the file"),
    (_annotation(id=1), "has the id 1, which is used twice"),
    (_annotation(segmentation={"size": [9, 9]}),
        "must have polygons or RLE with size and counts as its segmentation"),
    (_annotation(segmentation={"size": [96, 96], "counts": "\x01"}),
        "must have polygons or RLE with size and counts as its segmentation"),
    (_annotation(segmentation=[["a"] * 6]),
        "must have polygons that are lists of finite numbers as its segmentation"),
    (lambda content: content["annotations"][3].pop("segmentation"),
        "got None: without masks, {} trains on the boxes"),
    (lambda content: content["annotations"].append(7), "annotations must be a list of objects"),
    (lambda content: content["images"][0].pop("height"), "has no height, got None"),
    (lambda content: content["images"][0].pop("width"), "has no width, got None"),
]  # fmt: skip
