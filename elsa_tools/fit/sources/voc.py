"""Read Pascal VOC's XML files, as VOC itself, labelImg, CVAT and Roboflow write them.

- The image of ``Annotations/SUB/x.xml`` is the image ``x`` beside it or in ``JPEGImages/SUB`` or
  ``images/SUB``; else the file that ``<filename>`` names there. Images without an XML are not used.
- ``ImageSets/Main/train.txt``, ``val.txt`` and ``test.txt`` name the parts, or ``trainval.txt``
  where there is no ``train.txt``; without lists, folders named train, valid and test do.
- VOC counts pixels from 1, and xmax and ymax are the last pixels inside: a box from 1 to the width
  covers the image. So 1 is subtracted from xmin and ymin alone, as in Detectron2's reader.
  (MMDetection's also subtracts it from the others: its boxes are a pixel narrower.) Where a
  coordinate of the data set is below 1 or no whole number, its writer gave edges from 0: nothing is
  subtracted from any.
- ``<difficult>1`` becomes ``ignore``: training ignores the object, and detections of it count as
  neither right nor wrong.
- Classes are in alphabetical order.
- XML with a document type, the place of entities, is refused: no file is expanded.
"""

from __future__ import annotations

import math
import posixpath
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from elsa_core.data.problems import shown
from elsa_core.runtime.errors import UsageError, one_line

from .tree import IMAGES, TEST, TRAIN, VAL, Sample, Source, Tree, few, read_text, role_of, stem_of

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find(tree: Tree) -> dict[str, ElementTree.Element]:
    """Return {relative path: root} of the XML files with the root <annotation>."""
    found = {name: _parse(tree, name) for name in tree.ending(".xml")}
    return {name: root for name, root in found.items() if root.tag == "annotation"}


def _parse(tree: Tree, name: str) -> ElementTree.Element:
    path = tree.path(name)

    def refuse(*_: Any) -> None:
        raise UsageError(f"{path} has a document type, which may hide entities that never end")

    try:
        content = path.read_bytes()
        parser = expat.ParserCreate()
        parser.StartDoctypeDeclHandler = refuse
        parser.Parse(content, True)
        return ElementTree.fromstring(content)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (expat.ExpatError, ElementTree.ParseError, LookupError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is cut off or not XML: {one_line(error)}") from error


def read(tree: Tree, files: dict[str, ElementTree.Element], task: str | None) -> Source:
    """Return the content of files that `find` returns."""
    sets = image_sets(tree, "Main")
    source = Source(f"{tree.root} has {len(files)} files in Pascal VOC's format", [], [])
    images = tree.by_stem(tree.images)
    missing = []
    for name, root in files.items():
        stem = posixpath.basename(stem_of(name))
        if sets and stem not in sets:
            continue
        role = sets[stem] if sets else role_of(posixpath.dirname(name))
        image = _image(tree, name, root, images)
        if image is None:
            missing.append(str(tree.path(name)))
            continue
        sample = Sample(tree.path(image), role, source=str(tree.path(name)))
        sample.size = _size(root, sample.source)
        if role != TEST:
            sample.annotations = [_object(one, sample.source) for one in root.iter("object")]
        source.samples.append(sample)
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(files)} XML files in {tree.root} have no image, the first is "
            f"{missing[0]}"
        )
    boxes = [one["bbox"] for sample in source.samples for one in sample.annotations]
    edges = any(value < 1 or value != int(value) for box in boxes for value in box)
    for box in boxes:
        x, y, right, bottom = box
        x, y = (x, y) if edges else (x - 1, y - 1)
        box[:] = [x, y, right - x, bottom - y]
    kind = "edges from 0" if edges else "pixels from 1, the last one inside"
    source.layout += f", whose boxes give {kind}"
    source.classes = sorted({a["category"] for one in source.samples for a in one.annotations})
    used = {sample.path for sample in source.samples}
    spare = tree.spare({name for name in tree.images if tree.path(name) in used})
    stems = {posixpath.basename(stem_of(name)) for name in files}
    if lost := [stem for stem in sets if stem not in stems]:
        source.warnings.append(
            f"{len(lost)} images that ImageSets/Main lists in {tree.root} have no XML and are not "
            f"used: {few(lost)}"
        )
    if spare and not sets:
        source.warnings.append(
            f"{len(spare)} images in {tree.root} have no XML and are not used: {few(spare)}"
        )
    return source


def image_sets(tree: Tree, kind: str) -> dict[str, str | None]:
    """Return {stem: role} of the lists in ImageSets/KIND, a stem a line; {} without lists."""
    found: dict[str, str | None] = {}
    for role, file in ((TRAIN, "train"), (VAL, "val"), (TEST, "test"), (None, "trainval")):
        if role is None and TRAIN in found.values():
            continue
        for name in tree.ending(f"imagesets/{kind}/{file}.txt".lower()):
            lines = read_text(tree.path(name)).splitlines()
            stems = [stem for line in lines if (stem := line.strip().strip('"'))]
            both = [stem for stem in stems if role == VAL and found.get(stem) == TRAIN]
            if both:
                raise UsageError(f"{tree.path(name)} lists {both[0]}, which train.txt lists, too")
            for stem in stems:
                found.setdefault(stem, role)
    return found


def _image(
    tree: Tree, name: str, root: ElementTree.Element, images: dict[str, list[str]]
) -> str | None:
    """Return the image of an XML file, or None."""
    folder, file = posixpath.split(name)
    bases = [folder, *tree.beside(posixpath.join(folder, "."), IMAGES)]
    named = posixpath.basename((root.findtext("filename") or "").replace("\\", "/"))
    for stem in (stem_of(file), stem_of(named)):
        for base in bases:
            found = images.get(posixpath.join(base, stem), [])
            exact = [one for one in found if posixpath.basename(one) == named]
            if len(exact or found) > 1:
                raise UsageError(f"{tree.path(name)} may be of any of the images {few(found)}")
            if found:
                return (exact or found)[0]
    return None


def _size(root: ElementTree.Element, where: str) -> tuple[int, int] | None:
    """Return width and height; None where a writer left them out or 0."""
    texts = [root.findtext(f"size/{key}") for key in ("width", "height")]
    if all(text is None or text.strip() in ("", "0") for text in texts):
        return None
    width, height = (_number(text, where, "size") for text in texts)
    return int(width), int(height)


def _object(one: ElementTree.Element, where: str) -> dict[str, Any]:
    """Return an object, whose bbox is still VOC's [xmin, ymin, xmax, ymax]."""
    name = (one.findtext("name") or "").strip()
    if not name:
        raise UsageError(f"{where} has an object without a name")
    box = [_number(one.findtext(f"bndbox/{key}"), where, f"{key} of {name}") for key in CORNERS]
    if box[0] > box[2] or box[1] > box[3]:
        raise UsageError(f"{where} must have xmin <= xmax and ymin <= ymax for {name}, got {box}")
    difficult = (one.findtext("difficult") or "0").strip()
    return {"category": name, "bbox": box, "ignore": int(difficult not in ("0", "False", ""))}


def _number(text: str | None, where: str, what: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{where} must have a number as {what}, got {shown(text)}")
    return value
