"""Measures what the choices of a training depend on: the data set and the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from elsa_core.data.coco import read_json
from elsa_core.runtime.errors import UsageError

from .dataset import DataSet

# Label maps whose pixels are counted, evenly spaced over the data set.
COUNTED_MAPS = 200
IGNORED = 255
# Prints the free bytes and the name of the first GPU. In a process of its own: CUDA's context would
# take memory from the training.
CUDA = "import torch; print(torch.cuda.mem_get_info(0)[0], torch.cuda.get_device_name(0))"


@dataclass(frozen=True)
class Facts:
    """What is known of a data set.

    Sizes of objects are the square root of width times height, relative to the short side of their
    image.

    Args:
        images, val_images: number of images.
        short: median short side of the training images, in pixels.
        aspect: long side by short side that 95 % of the images do not exceed.
        classes: names.
        objects: number of objects that are trained; 0 for label maps.
        small, large: sizes that 10 % and 90 % of the objects do not exceed.
        narrow, tall: height by width of the objects, likewise.
        most: largest number of objects in an image.
        shares: part of the labelled pixels that each class has; empty without label maps.
    """

    images: int
    val_images: int
    short: int
    aspect: float
    classes: tuple[str, ...]
    objects: int = 0
    small: float = 0
    large: float = 0
    narrow: float = 1
    tall: float = 1
    most: int = 0
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Machine:
    """``device``: "cuda" or "cpu"; ``memory``: free bytes of it; ``cores``: usable by a process."""

    device: str
    memory: int
    cores: int
    name: str

    def __str__(self) -> str:
        where = self.name if self.device == "cuda" else "CPU"
        return f"{where}, {self.cores} cores, {self.memory / 2**30:.0f} GiB free"


def measure(data: DataSet) -> Facts:
    """Return the facts of a data set, from its training part."""
    if data.train.annotations is None:
        return _of_maps(data)
    coco = read_json(str(data.train.annotations))
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    trained = [one for one in coco["annotations"] if not one.get("iscrowd")]
    if not trained:
        raise UsageError(f"{data.train.annotations} has no object to train")
    counts: dict[Any, int] = {}
    for one in trained:
        counts[one["image_id"]] = counts.get(one["image_id"], 0) + 1
    boxes = np.array([(*one["bbox"][2:], min(sizes[one["image_id"]])) for one in trained], float)
    width, height, short = np.maximum(boxes, 1e-6).T
    small, large = np.quantile(np.sqrt(width * height) / short, [0.1, 0.9])
    narrow, tall = np.quantile(height / width, [0.1, 0.9])
    return Facts(
        data.train.count,
        data.val.count,
        *_sides(sizes.values()),
        data.classes,
        len(trained),
        float(small),
        float(large),
        float(narrow),
        float(tall),
        max(counts.values()),
    )


def _sides(sizes: Iterable[tuple[int, int]]) -> tuple[int, float]:
    sides = np.sort(np.array(list(sizes)), axis=1)
    return int(np.median(sides[:, 0])), float(np.quantile(sides[:, 1] / sides[:, 0], 0.95))


def _of_maps(data: DataSet) -> Facts:
    assert data.train.maps is not None
    paths = sorted(path for path in Path(data.train.maps).rglob("*") if path.is_file())
    sizes = []
    counts = np.zeros(256, np.int64)
    for path in paths[:: -(-len(paths) // COUNTED_MAPS) or 1]:
        with Image.open(path) as image:
            sizes.append(image.size)
            values = np.asarray(image).astype(np.int64)
        counts += np.bincount(np.minimum(values.ravel(), IGNORED), minlength=256)
    first = int(data.reduce_zero_label)
    labelled = counts[first : first + len(data.classes)]
    shares = labelled / max(labelled.sum(), 1)
    short, aspect = _sides(sizes)
    return Facts(
        data.train.count,
        data.val.count,
        short,
        aspect,
        data.classes,
        shares=tuple(float(share) for share in shares),
    )


def machine(device: str | None) -> Machine:
    """Return this machine.

    Args:
        device: "cpu" or "cuda"; None: CUDA where it works.

    Raises:
        UsageError: "cuda" without a device.
    """
    cores = len(os.sched_getaffinity(0))
    if device != "cpu" and torch.cuda.is_available():
        said = subprocess.check_output([sys.executable, "-c", CUDA], text=True)
        memory, _, name = said.strip().partition(" ")
        return Machine("cuda", int(memory), cores, name)
    if device == "cuda":
        raise UsageError("--device cuda needs a GPU that PyTorch can use, and there is none")
    return Machine("cpu", psutil.virtual_memory().available, cores, "CPU")
