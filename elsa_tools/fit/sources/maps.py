"""Read label maps: for each image a file of one channel, whose values are the classes.

- The label map of ``images/SUB/x.jpg`` is ``masks/SUB/x.png`` (folder names: `IMAGES`, `MAPS`), or
  ``x_mask.png`` beside the image (Roboflow). A palette's indices are the values.
- ``ImageSets/Segmentation/train.txt`` and ``val.txt`` name the parts; without them, folders named
  train, valid and test do.
- Value n is name n, counted from 0, of ``classes.txt``, ``labels.txt``, ``data.yaml`` (names) or
  Roboflow's ``_classes.csv``, or class_n without such a file. One name too few means that 0 has
  none: it is called background. 255 is no class.
- Where 0 occurs in no label map, it means no class, and classes begin at 1 (``reduce_zero_label``).
- Label maps that hold only 0 and 255 are masks of one class: 255 is read as 1, in copies.
"""

from __future__ import annotations

import csv
import posixpath

from elsa_core.data.label_maps import IGNORE
from elsa_core.runtime.errors import UsageError

from .tree import IMAGES, Sample, Source, Tree, few, read_text, role_of, stem_of
from .voc import image_sets
from .yolo import read_yaml

MAPS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "ann_dir"),
    *("segmentationclass", "label_maps", "maps", "gt"),
)
ENDINGS = (".png", ".bmp", ".tif", ".tiff")
SUFFIX = "_mask"
NAMES = ("classes.txt", "labels.txt", "_classes.csv", "data.yaml")


def find(tree: Tree) -> dict[str, str]:
    """Return {image: label map} by relative paths.

    Raises:
        UsageError: an image has several label maps, or one of another format.
    """
    maps = tree.by_stem(tree.images)
    found: dict[str, str] = {}
    for image in tree.images:
        folder, file = posixpath.split(stem_of(image))
        wanted = [f"{folder}/{file}{SUFFIX}".lstrip("/")]
        if any(part.lower() in IMAGES for part in folder.split("/")):
            wanted += [f"{one}/{file}" for one in tree.beside(folder, MAPS)]
        several = [one for stem in wanted for one in maps.get(stem, []) if one != image]
        if len(several) > 1:
            raise UsageError(
                f"{tree.path(image)} may have any of the label maps {few(several)}: keep one"
            )
        if several and not several[0].lower().endswith(ENDINGS):
            raise UsageError(
                f"label map {tree.path(several[0])} must be PNG, BMP or TIFF: others change values"
            )
        if several:
            found[image] = several[0]
    return found


def read(tree: Tree, pairs: dict[str, str]) -> Source:
    """Return the content of what `find` returns; `classify` names the classes."""
    folders = sorted({posixpath.dirname(one) or "." for one in pairs.values()})
    source = Source(f"{tree.root} has {len(pairs)} label maps in {few(folders)}", names(tree), [])
    sets = image_sets(tree, "Segmentation")
    for image, labels in pairs.items():
        stem = posixpath.basename(stem_of(image))
        if sets and stem not in sets:
            continue
        role = sets[stem] if sets else role_of(posixpath.dirname(image))
        path = tree.path(labels)
        source.samples.append(Sample(tree.path(image), role, map=path, source=str(path)))
    if not sets and (spare := tree.spare({*pairs, *pairs.values()})):
        source.warnings.append(
            f"{len(spare)} files in {tree.root} are images without label map or label maps without "
            f"image, and not used: {few(spare)}"
        )
    return source


def names(tree: Tree) -> list[str]:
    """Return the names of the classes from the outermost file that has them, or []."""
    for name in tree.ending(*NAMES):
        if posixpath.basename(name).lower() not in NAMES:
            continue
        path = tree.path(name)
        if name.endswith(".csv"):
            rows = [
                [cell.strip() for cell in row] for row in csv.reader(read_text(path).split("\n"))
            ]
            rows = [row for row in rows if row][1:]
            if any(len(row) != 2 or row[0] != str(n) for n, row in enumerate(rows)):
                raise UsageError(f"{path} must have lines of a value, from 0 on, and a name")
            return [row[1] for row in rows]
        if not name.endswith(".txt"):
            content = read_yaml(path)
            content = content.get("names") if isinstance(content, dict) else None
            return list(content.values() if isinstance(content, dict) else content or [])
        return list(filter(None, map(str.strip, read_text(path).splitlines())))
    return []


def classify(source: Source, values: list[set[int]]) -> bool:
    """Fill in the classes of a source, and those of its samples as annotations.

    Args:
        values: values of each sample's label map.

    Returns:
        Whether 255 must be read as 1.

    Raises:
        UsageError: a value has no name.
    """
    found = set().union(*values)
    binary = found == {0, IGNORE}
    if binary:
        values = [{one and 1 for one in mine} for mine in values]
    found = set().union(*values) - {IGNORE}
    if not found:
        raise UsageError(
            f"{source.samples[0].map} and all other label maps hold 255 alone, no class"
        )
    last, given = max(found), source.classes
    if wrong := [one for one in found if not 0 <= one < IGNORE]:
        number = next(n for n, mine in enumerate(values) if wrong[0] in mine)
        raise UsageError(
            f"labels must be 0 to 254, or 255 for none, got {wrong[0]} in "
            f"{source.samples[number].map}"
        )
    if given and last > len(given):
        number = next(n for n, mine in enumerate(values) if last in mine)
        raise UsageError(
            f"{source.samples[number].map} has the value {last}, but there are {len(given)} names"
        )
    if not given or len(given) == last:  # 0 has no name
        source.reduce_zero_label = 0 not in found
        given = given or [f"class_{one}" for one in range(1, last + 1)]
        source.classes = given if source.reduce_zero_label else ["background", *given]
    first = int(source.reduce_zero_label)
    for sample, mine in zip(source.samples, values, strict=True):
        mine = mine - {IGNORE, 0} if first else mine - {IGNORE}
        sample.annotations = [{"category": source.classes[one - first]} for one in sorted(mine)]
    zero = "no class" if first else repr(source.classes[0])
    source.layout += f"; 0 is {zero}" + (", 255 is read as 1" if binary else ", 255 is no class")
    return binary
