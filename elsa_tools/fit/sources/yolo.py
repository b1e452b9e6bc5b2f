"""Read YOLO's text files, as Ultralytics, Roboflow, Label Studio and CVAT write them.

- ``data.yaml`` names the classes and the parts; ``classes.txt`` or ``obj.names`` names the classes
  where there is none.
- ``path`` is relative to the YAML's folder, which also stands for a path that does not exist.
- ``../train/images`` stands for ``train/images`` where only that exists (Roboflow), and a path of
  another machine, ``/content/NAME/train/images``, for the longest end of 2 parts or more that does.
- The labels of ``.../images/SUB/x.jpg`` are in ``.../labels/SUB/x.txt``, or else beside the image.
  An image without labels, or with an empty file, is background.
- A line has a class and x and y of the centre, width and height, or a class and the corners of a
  polygon, in fractions of the image's width and height. These are of the image as it is displayed:
  EXIF orientation applies, as in Ultralytics' loader.
- Boxes and polygons are cut at the edges of the image. A line that is there twice counts once.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from elsa_core.data.images import ENDINGS
from elsa_core.data.problems import shown
from elsa_core.runtime.errors import UsageError, one_line

from .tree import TEST, TRAIN, VAL, Sample, Source, Tree, few, read_text, role_of, stem_of

NAMES = ("classes.txt", "obj.names")
# How far a value may leave 0..1 by rounding; Ultralytics allows the same.
SLACK = 0.01


@dataclass
class Found:
    """A data set in YOLO's format.

    Args:
        file: relative path of the YAML, or of the file of class names.
        content: content of the YAML; None without one.
    """

    file: str
    content: dict[str, Any] | None = None


def find(tree: Tree, only: str | None = None) -> list[Found]:
    """Return the YAML files that name classes and parts, or else the files of class names.

    Args:
        only: the one file to read; None for all.
    """
    found = []
    for name in tree.ending(".yaml", ".yml"):
        if name.count("/") > 1 or only not in (None, name):
            continue
        content = read_yaml(tree.path(name))
        if isinstance(content, dict) and "names" in content and {TRAIN, VAL} & set(content):
            found.append(Found(name, content))
    if found or only or not has_labels(tree):
        return found
    return [Found(name) for name in tree.files if PurePosixPath(name).name in NAMES]


def read_yaml(path: Path) -> Any:
    """Return a YAML file's content with all scalars as text: a class may be called "no" or 007."""
    try:
        return yaml.load(read_text(path), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{path} is not YAML: {one_line(error)}") from error


def read(tree: Tree, found: list[Found], task: str | None) -> Source:
    """Return the content of what `find` returns."""
    if len(found) > 1:
        raise UsageError(
            f"{tree.root} must have one file that names the classes of YOLO's labels, got "
            f"{few(one.file for one in found)}"
        )
    (one,) = found
    path = tree.path(one.file)
    keypoints = 0
    if one.content is None:
        names = list(filter(None, map(str.strip, read_text(path).splitlines())))
        images = [(role_of(os.path.dirname(name)), tree.path(name)) for name in tree.images]
    else:
        names = _names(one.content, path)
        keypoints = _keypoints(one.content, path)
        images = _parts(one.content, path)
    source = Source(f"{tree.root} is in YOLO's format: {one.file}", names, [])
    repeated = []
    for role, image in images:
        places = [Path(place) for place in labels_of(image.as_posix())]
        labels = next(filter(os.path.isfile, places), None)
        sample = Sample(image, role, source=str(labels or places[0]))
        if labels and role != TEST:
            lines = [" ".join(line.split()) for line in read_text(labels).splitlines()]
            numbers = {line: number for number, line in enumerate(lines, start=1) if line}
            if len(numbers) < sum(map(bool, lines)):
                repeated.append(str(labels))
            sample.annotations = [
                _annotation(line, f"{labels}: line {number}", names, keypoints)
                for line, number in numbers.items()
            ]
        source.samples.append(sample)
    if repeated:
        source.warnings.append(
            f"{len(repeated)} label files have a line twice, which counts once: {few(repeated)}"
        )
    return source


def has_labels(tree: Tree) -> bool:
    """Whether images have labels."""
    return any(place in tree.files for name in tree.images for place in labels_of(name))


def labels_of(image: str) -> list[str]:
    """Return the paths where an image's labels may be, in the order in which they are tried."""
    beside = stem_of(image) + ".txt"
    head, found, tail = f"/{beside}".rpartition("/images/")
    return [f"{head}/labels/{tail}"[1:], beside] if found else [beside]


def _names(content: dict[str, Any], path: Path) -> list[str]:
    names = content["names"]
    if isinstance(names, dict):
        expected = [str(number) for number in range(len(names))]
        if sorted(names) != sorted(expected):
            raise UsageError(
                f"{path}: names must be a list or count from 0 to {len(names) - 1}, got keys "
                f"{few(map(str, names))}"
            )
        names = [names[number] for number in expected]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UsageError(f"{path}: names must be a list of class names, got {shown(names)}")
    if "nc" in content and content["nc"] != str(len(names)):
        raise UsageError(
            f"{path}: nc must be the number of names, {len(names)}, got {shown(content['nc'])}"
        )
    return names


def _keypoints(content: dict[str, Any], path: Path) -> int:
    """Return the number of values that keypoints add to a line: those of a pose are left out."""
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or not all(isinstance(n, str) and n.isdecimal() for n in shape):
        raise UsageError(f"{path}: kpt_shape must be [points, 2 or 3], got {shown(shape)}")
    return math.prod(map(int, shape))


def _parts(content: dict[str, Any], path: Path) -> list[tuple[str | None, Path]]:
    """Return (role, image) of the parts that a YAML names."""
    base = path.parent
    if isinstance(wanted := content.get("path"), str) and os.path.isdir(base / wanted):
        base = base / wanted
    images: dict[str, list[Path]] = {}
    for role in (TRAIN, VAL, TEST):
        key = "valid" if role == VAL and VAL not in content else role
        entries = content.get(key) or []
        entries = [entries] if isinstance(entries, str) else entries
        if not isinstance(entries, list) or not all(isinstance(one, str) for one in entries):
            raise UsageError(
                f"{path}: {key} must be a path or a list of them, got {shown(entries)}"
            )
        found = [image for one in entries for image in _images(one, base, role, path)]
        images[role] = list(dict.fromkeys(found))
    if set(images[VAL]) == set(images[TRAIN]):
        del images[VAL]  # as in the smallest examples: another one is split off
    return [(role, image) for role, found in images.items() for image in found]


def _images(entry: str, base: Path, role: str, path: Path) -> list[Path]:
    """Return the images that an entry of a YAML stands for: a folder, a list or one image."""
    place = _place(entry.replace("\\", "/"), base)
    if os.path.isdir(place):
        tree = Tree(place)
        found = [tree.path(name) for name in tree.images]
    elif os.path.isfile(place) and place.suffix.lower() == ".txt":
        lines = filter(None, map(str.strip, read_text(place).splitlines()))
        found = [_listed(line, base, place) for line in lines]
    elif os.path.isfile(place) and place.suffix.lower() in ENDINGS:
        found = [place]
    elif role == TEST:
        found = []  # not used
    else:
        raise UsageError(f"{path}: {role} is {entry}, but {place} is not there")
    if not found and role != TEST:
        raise UsageError(f"{path}: {role} is {entry}, which has no images")
    return [Path(os.path.normpath(image)) for image in found]


def _place(entry: str, base: Path) -> Path:
    """Return the path that an entry stands for; see the rules of this module."""
    tried = [base / entry]
    if entry.startswith("../"):
        tried.append(base / entry[3:])
    elif entry.startswith("/") or entry[1:2] == ":":
        parts = PurePosixPath(entry).parts
        tried += [base.joinpath(*parts[place:]) for place in range(1, len(parts) - 1)]
    return next(filter(os.path.exists, tried), tried[0])


def _listed(line: str, base: Path, file: Path) -> Path:
    """Return the image of a line, relative to the list or to the data set (CVAT: after "data/")."""
    line = line.replace("\\", "/")
    tried = [file.parent / line, base / line, base / line.removeprefix("data/")]
    found = next(filter(os.path.isfile, tried), None)
    if found is None:
        raise UsageError(f"{file} lists {line}, but {tried[0]} is not there")
    return found


def _annotation(line: str, where: str, names: list[str], keypoints: int) -> dict[str, Any]:
    """Return an object in fractions of the image: a box, or a polygon, as lists of numbers."""
    try:
        label, *values = map(float, line.split())
    except ValueError as error:
        raise UsageError(f"{where} must have numbers only") from error
    if not all(map(math.isfinite, [label, *values])):
        raise UsageError(f"{where} must have finite numbers")
    if label != int(label) or not 0 <= label < len(names):
        raise UsageError(f"{where} must begin with a class of 0 to {len(names) - 1}, got {label:g}")
    if keypoints and len(values) == 4 + keypoints:
        values = values[:4]
    elif keypoints or (len(values) != 4 and (len(values) % 2 or len(values) < 6)):
        rule = f"{4 + keypoints} numbers" if keypoints else "4 numbers, or 3 or more pairs"
        raise UsageError(f"{where} must have {rule} after the class, got {len(values)}")
    if min(values) < -SLACK or max(values) > 1 + SLACK:
        worst = max(values, key=lambda value: abs(value - 0.5))
        raise UsageError(f"{where} must have fractions of the image, 0 to 1, got {worst:g}")
    return {"category": names[int(label)], "fractions": values}


def in_pixels(sample: Sample, width: int, height: int) -> None:
    """Turn the objects of a sample, which `read` leaves in fractions, into pixels in place."""
    for one in sample.annotations:
        values = one.pop("fractions", None)
        if values is None:
            continue
        points = np.asarray(values).reshape(-1, 2)
        if len(values) == 4:
            points = points[0] + points[1] * [[-0.5], [0.5]]
        points = (points.clip(0, 1) * (width, height)).round(3)
        low, high = points.min(axis=0), points.max(axis=0)
        one["bbox"] = [*low.tolist(), *(high - low).round(3).tolist()]
        if len(values) > 4:
            one["segmentation"] = [points.ravel().tolist()]
