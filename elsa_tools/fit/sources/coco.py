"""Read exports in COCO's format: Roboflow, CVAT, Label Studio and folders made by hand.

Images are found by these rules, the first that has a file for every image of the JSON:

1. ``file_name`` is relative to the JSON's folder, its folder ``images``, the folder above, or the
   folder ``images`` there;
2. it is relative to ``images/PART`` or ``PART`` beside that, for ``instances_PART.json``, or to a
   folder of the same part: ``images/train`` for ``train.json``;
3. its last part alone names a file, only once in the source: Label Studio writes
   ``../../label-studio/data/media/upload/1/ab-x.jpg`` or ``images\\x.jpg`` for ``images/ab-x.jpg``.

Numbers that are written as text, as in Roboflow's boxes of polygons, are read as numbers.
"""

from __future__ import annotations

import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from elsa_core.data.classes import ordered_names
from elsa_core.data.coco import first_problem, normalised, read_json
from elsa_core.data.coco_rules import is_crowd
from elsa_core.data.problems import named
from elsa_core.runtime.errors import UsageError

from ..dataset import INSTANCES, SEMANTIC
from .tree import IMAGES, TEST, TRAIN, Sample, Source, Tree, few, role_of, stem_of

KEYS = ("images", "annotations", "categories")
KEPT = ("bbox", "segmentation", "area", "iscrowd", "ignore", "keypoints", "num_keypoints")
# Other files of COCO's releases and of exports in its format.
OTHERS = ("captions", "person_keypoints", "panoptic", "stuff", "image_info")


def find(tree: Tree, only: str | None = None) -> dict[str, dict[str, Any]]:
    """Return {relative path: content} of the files in COCO's format.

    Args:
        only: the one file to read; None for all.
    """
    images = {stem_of(name) for name in tree.images}
    found = {}
    for name in tree.ending(".json"):
        # A JSON with the name of an image is labelme's.
        other = stem_of(name) in images or posixpath.basename(name).startswith(OTHERS)
        if (other and only is None) or only not in (None, name):
            continue
        content = read_json(str(tree.path(name)))
        if isinstance(content, dict) and all(_is_list(content.get(key)) for key in KEYS):
            found[name] = content
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def read(tree: Tree, files: dict[str, dict[str, Any]], task: str | None) -> Source:
    """Return the content of files that `find` returns; a test part is not read."""
    roles = {role_of(name): name for name in files}
    if len(roles) < len(files) or (None in roles and len(roles) > 1):
        raise UsageError(
            f"{tree.root} must have one annotation file, or one of each part with train, val or "
            f"test in its path, got {few(files)}: name the one to use instead of the folder"
        )
    used = {name: files[name] for role, name in roles.items() if role != TEST}
    for content in used.values():
        content["categories"] = _without_groups(content)
        for one in content["annotations"]:
            one |= {key: _numbers(one[key]) for key in ("bbox", "area") if key in one}
    masks = _wants_masks(used.values(), task)
    source = Source(_sentence(tree, roles), [], [])
    for role, name in sorted(roles.items(), key=lambda one: one[0] != TRAIN):
        path = str(tree.path(name))
        if role == TEST:
            count = len(files[name]["images"])
            source.samples += [Sample(tree.path(name), TEST, source=path)] * count
            continue
        content = files[name]
        if problem := first_problem(content, masks):
            raise UsageError(f"{path}: {problem}")
        content = normalised(content, masks)
        names = ordered_names(content["categories"])
        source.classes += [one for one in names if one not in source.classes]
        source.samples += _samples(tree, name, role, content)
    listed = {sample.path for sample in source.samples}
    if spare := tree.spare({name for name in tree.images if tree.path(name) in listed}):
        source.warnings.append(
            f"{len(spare)} images in {tree.root} are in no annotation file and not used: "
            f"{few(spare)}"
        )
    return source


def _numbers(value: Any) -> Any:
    """Return a value in which texts that are numbers are numbers."""
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _without_groups(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the categories without those that only group others, which Roboflow writes.

    Such a category has no annotation and is the supercategory of another one.
    """
    used = [one.get("category_id") for one in content["annotations"]]
    known = {one for one in used if isinstance(one, (int, str))}
    categories = content["categories"]
    return [
        one
        for one in categories
        if not isinstance(one.get("id"), (int, str))
        or one["id"] in known
        or all(
            one is other or other.get("supercategory") != one.get("name") for other in categories
        )
    ]


def _wants_masks(contents: Iterable[dict[str, Any]], task: str | None) -> bool:
    if task is not None:
        return task in (INSTANCES, SEMANTIC)
    objects = [one for content in contents for one in content["annotations"] if not is_crowd(one)]
    return bool(objects) and all(one.get("segmentation") for one in objects)


def _sentence(tree: Tree, roles: dict[str | None, str]) -> str:
    count = "one file" if len(roles) == 1 else f"{len(roles)} files"
    return f"{tree.root} has {count} in COCO's format: {', '.join(roles.values())}"


def _samples(tree: Tree, name: str, role: str | None, content: dict[str, Any]) -> list[Sample]:
    paths = _locate(tree, name, role, [image["file_name"] for image in content["images"]])
    classes = {one["id"]: one["name"] for one in content["categories"]}
    samples: dict[str, Sample] = {}
    of_image: dict[Any, Sample] = {}
    for image in content["images"]:
        path = paths[image["file_name"]]
        size = image["width"], image["height"]
        source = str(tree.path(name))
        made = Sample(tree.path(path), role, size=size, source=source)
        of_image[image["id"]] = samples.setdefault(path, made)
    for one in content["annotations"]:
        kept = {key: one[key] for key in KEPT if key in one}
        of_image[one["image_id"]].annotations.append(
            {**kept, "category": classes[one["category_id"]]}
        )
    return list(samples.values())


def _locate(tree: Tree, file: str, role: str | None, names: list[str]) -> dict[str, str]:
    """Return {file_name: path relative to the source}.

    Raises:
        UsageError: an image has no file, or its name alone stands for several.
    """
    plain = {name: name.replace("\\", "/") for name in names}
    folder = posixpath.dirname(file)
    above = posixpath.dirname(folder)
    subset = posixpath.basename(stem_of(file)).partition("_")[2]
    bases = [folder, f"{folder}/images", above, f"{above}/images"]
    bases += [f"{above}/images/{subset}", f"{above}/{subset}", *_folders_of(tree, role)]
    best: dict[str, str] = {}
    for base in dict.fromkeys(bases):
        paths = {n: posixpath.normpath(posixpath.join(base, p)) for n, p in plain.items()}
        found = {name: path.lstrip("/") for name, path in paths.items()}
        found = {name: path for name, path in found.items() if path in tree.files}
        if len(found) == len(plain):
            return found
        best = max(best, found, key=len)
    by_base = defaultdict(list)
    for path in tree.images:
        by_base[posixpath.basename(path)].append(path)
    for name in [name for name in plain if name not in best]:
        last = posixpath.basename(plain[name])
        several = by_base.get(last) or by_base.get(unquote(last), [])
        if len(several) > 1:
            raise UsageError(
                f"{tree.path(file)}: image {named(name)} may be any of {few(several)}: its "
                "file_name must be relative to the folder of images"
            )
        if several:
            best[name] = several[0]
    if missing := [name for name in plain if name not in best]:
        raise UsageError(
            f"{tree.path(file)}: {len(missing)} of {len(plain)} images have no file in "
            f"{tree.root}, the first is {named(missing[0])}"
        )
    if len(set(best.values())) < len(set(plain.values())):
        twice = next(path for path, n in Counter(best.values()).items() if n > 1)
        raise UsageError(f"{tree.path(file)}: several images stand for the one file {twice}")
    return best


def _folders_of(tree: Tree, role: str | None) -> list[str]:
    """Return the folders whose own name says the part, those in a folder of images first."""
    found = [one for one in tree.folders if role and role_of(posixpath.basename(one)) == role]
    inside = {one: any(part.lower() in IMAGES for part in one.split("/")) for one in found}
    return sorted(found, key=lambda one: (not inside[one], one))
