"""From a folder of annotated images to a checked data set for both frameworks.

Reads COCO's format, YOLO's, Pascal VOC's and label maps, in the layouts of the usual exports; each
reader states its rules. Images are never copied or changed.

The loaders of `supervision` judge the boxes in the tests. They do not read here: they turn polygons
into pixels, with the right and lower edge inside (625 for a square of 24), take one folder without
parts at a time, and do not check.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from elsa_core.data.coco_rules import is_crowd
from elsa_core.data.label_maps import IGNORE
from elsa_core.data.problems import shown
from elsa_core.runtime.errors import UsageError

from ..dataset import BOXES, INSTANCES, SEMANTIC, TASKS, DataSet
from . import coco, maps, voc, yolo
from .opening import contents, each, header_of, values_of
from .split import Entry, choose
from .tree import TEST, TRAIN, VAL, Sample, Source, Tree, few, has_mask
from .writing import (
    binary,
    check_objects,
    checked,
    coco_of,
    drawn,
    folder_of,
    link_maps,
    write_coco,
)

EXPECTED = (
    "a JSON in COCO's format, a data.yaml of YOLO, XML files of Pascal VOC, or folders images and "
    "masks with label maps"
)


def prepare(
    source: Path,
    out: Path,
    task: str | None = None,
    validation: float = 0.2,
    progress: bool = False,
) -> DataSet:
    """Recognise, check, split and convert a folder of annotated images.

    Args:
        source: folder, or a JSON or YAML in it that takes the place of all others.
        out: folder for what is written: train.json and val.json, or for label maps train and val
            with links to images and label maps.
        task: "instances", "boxes" or "semantic"; None for instances if all objects have masks,
            boxes if some have none, and semantic for label maps.
        validation: share of the images that is split off where there is no validation part.

    Raises:
        UsageError: the source has no layout that is known, or more than one, or an error; nothing
            has been written.
    """
    if task not in (None, *TASKS):
        raise UsageError(f"task must be one of {', '.join(TASKS)}, got {shown(task)}")
    if not 0 < validation < 1:
        raise UsageError(f"validation must be a share between 0 and 1, got {validation:g}")
    if out.resolve() == source.resolve():
        raise UsageError(f"{out} must be another folder than that of the images")
    found, task = recognise(source, out, task)
    if any(sample.path.is_absolute() for sample in found.samples):
        for sample in found.samples:
            sample.path = sample.path.absolute()
    unused = sum(sample.role == TEST for sample in found.samples)
    found.samples = [sample for sample in found.samples if sample.role != TEST]
    if not found.samples:
        raise UsageError(f"{source} has no images for training")
    headers = each(header_of, found.samples, "opening images", progress)
    for sample, header in zip(found.samples, headers, strict=True):
        sample.size = header.width, header.height
        yolo.in_pixels(sample, *sample.size)
    if deep := [one for one, header in zip(found.samples, headers, strict=True) if header.is_deep]:
        found.warnings.append(
            f"{len(deep)} images have 16 bits, of which the upper 8 are used: "
            f"{few(str(one.path) for one in deep)}"
        )
    labels = None
    if found.samples[0].map:
        values = each(values_of, found.samples, "opening label maps", progress)
        labels = binary if maps.classify(found, values) else None
    else:
        check_objects(found, task)
    parts, split = _parts(found, validation, progress)
    if unused:
        split += f"; the test part of {unused} images is left for you"
    found.warnings += _lost_classes(parts[TRAIN], found.classes)
    if task == SEMANTIC:
        if not labels and not found.samples[0].map:
            if len(found.classes) >= IGNORE:
                raise UsageError(
                    f"label maps hold {IGNORE - 1} classes beside the background, got "
                    f"{len(found.classes)}"
                )
            found.layout += "; label maps are drawn from its masks, 0 is 'background'"
            labels = partial(drawn, classes=found.classes)
            found.classes = ["background", *found.classes]
        train, val = (link_maps(parts[role], out / role, labels) for role in (TRAIN, VAL))
    else:
        made = {role: coco_of(part, found.classes, task) for role, part in parts.items()}
        for role, content in made.items():
            found.warnings += checked(out / f"{role}.json", content, task, progress)
        train, val = (
            write_coco(out / f"{role}.json", made[role], folder_of(parts[role]))
            for role in (TRAIN, VAL)
        )
    return DataSet(
        task,
        tuple(found.classes),
        train,
        val,
        found.layout,
        split,
        reduce_zero_label=found.reduce_zero_label,
        warnings=tuple(found.warnings),
    )


def recognise(source: Path, out: Path, task: str | None) -> tuple[Source, str]:
    """Return the content of a folder, and the task that it is for."""
    only = source.name if source.is_file() else None
    if only and not only.lower().endswith((".json", ".yaml", ".yml")):
        raise UsageError(
            f"{source} must be a folder, or a JSON or YAML in one: unpack an archive first"
        )
    tree = Tree(source.parent if only else source, out)
    readers: dict[str, tuple[Any, Any]] = {
        "COCO's format": (coco, coco.find(tree, only)),
        "YOLO's format": (yolo, yolo.find(tree, only)),
        "Pascal VOC's format": (voc, {} if only else voc.find(tree)),
    }
    kinds = {name: one for name, one in readers.items() if one[1]}
    wants_maps = not only and (task == SEMANTIC or not kinds)
    if wants_maps and (pairs := maps.find(tree)):
        if task not in (None, SEMANTIC):
            raise UsageError(
                f"task {task} needs objects, but {source} has label maps, which have none: only "
                "semantic is possible"
            )
        return maps.read(tree, pairs), SEMANTIC
    if len(kinds) != 1:
        what = f"{' and '.join(kinds)}: name the JSON or YAML to use instead of the folder"
        if not kinds:
            what = f"none of them{_hint(tree, only)}"
        raise UsageError(f"{source} must have one of {EXPECTED}; it has {what}")
    ((module, content),) = kinds.values()
    found: Source = module.read(tree, content, task)
    objects = [
        (one, sample.source)
        for sample in found.samples
        for one in sample.annotations
        if not is_crowd(one)
    ]
    if not objects:
        raise UsageError(f"{source} has no annotated object")
    bare = [where for one, where in objects if not has_mask(one)]
    if bare and task in (INSTANCES, SEMANTIC):
        raise UsageError(
            f"task {task} needs a mask for each object, but {len(bare)} of {len(objects)} are "
            f"boxes only, the first in {bare[0]}"
        )
    return found, task or (BOXES if bare else INSTANCES)


def _hint(tree: Tree, only: str | None) -> str:
    """Return what a folder has instead of a known layout, as the end of a sentence, or ""."""
    if yolo.has_labels(tree):
        return ", but labels of YOLO without a data.yaml or classes.txt that names the classes"
    if tree.ending(".json"):
        return f", but {few(tree.ending('.json'))}: export it as COCO"
    if tree.ending(".xml"):
        return f", but {few(tree.ending('.xml'))}: export it as COCO or Pascal VOC"
    return f", but {len(tree.images)} images"


def _parts(found: Source, validation: float, progress: bool) -> tuple[dict[str, list[Sample]], str]:
    """Return {role: samples}, and a sentence on how validation was made.

    Raises:
        UsageError: a part is missing or has no object.
    """
    samples = found.samples
    content = contents(samples, progress)
    roles = {sample.role for sample in samples}
    where = samples[0].source
    if TRAIN not in roles and VAL in roles or None in roles and len(roles) > 1:
        named = ", ".join(sorted(role or "no part" for role in roles))
        raise UsageError(f"images must be for train and val, or of one part, got {named} ({where})")
    if VAL in roles:
        held = {one for one, sample in zip(content, samples, strict=True) if sample.role == VAL}
        both = [
            sample
            for one, sample in zip(content, samples, strict=True)
            if sample.role == TRAIN and one in held
        ]
        if both:
            found.warnings.append(
                f"{len(both)} images for training are copies of images for validation and not used "
                f"for training: {few(str(sample.path) for sample in both)}"
            )
        left = {id(sample) for sample in both}
        parts = {
            role: [one for one in samples if one.role == role and id(one) not in left]
            for role in (TRAIN, VAL)
        }
        sentence = f"{len(parts[VAL])} images for validation are those of the source"
    else:
        folder = folder_of(samples)
        entries = [
            Entry(sample.path.relative_to(folder).as_posix(), one, sample.classes)
            for sample, one in zip(samples, content, strict=True)
        ]
        chosen, sentence = choose(entries, validation)
        parts = {
            TRAIN: [one for number, one in enumerate(samples) if number not in chosen],
            VAL: [one for number, one in enumerate(samples) if number in chosen],
        }
    for role, part in parts.items():
        if not any(sample.classes for sample in part):
            raise UsageError(
                f"{len(part)} images for {role} have no object: at least one must ({where}, ...)"
            )
    return parts, sentence


def _lost_classes(train: list[Sample], classes: list[str]) -> list[str]:
    seen = Counter(name for sample in train for name in sample.classes)
    lost = [name for name in classes if name not in seen]
    return [f"{len(lost)} classes have no object for training: {few(lost)}"] if lost else []
