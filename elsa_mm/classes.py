"""Class names: the same order in the checkpoint, the config and all annotation files of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.runner import Runner

from elsa_core.data.classes import difference, labels_by_name
from elsa_core.data.coco import read_json
from elsa_core.runtime.errors import UsageError

from .nested import datasets_in, leaves

# MMDetection's data sets that number categories in the file's order -> ours.
BY_NAME = {name: f"elsa_mm.coco.{name}" for name in ("CocoDataset", "CityscapesDataset")}
BY_NAME["CocoPanopticDataset"] = "elsa_mm.panoptic.CocoPanopticDataset"

_OURS = {place.rpartition(".")[0] for place in BY_NAME.values()}


def settle(cfg: Config, parts: Sequence[str], stored: Sequence[str] | None = None) -> list[str]:
    """Gives the data sets of a run one order of classes, before they are built.

    MMDetection's CocoDataset and CityscapesDataset become ours, which map categories by name. If a
    config lists the model's classes in another order, it gets the model's order. Returns notes for
    the log.

    Args:
        parts: "train", "val", "test": the loaders that the run uses, training first.
        stored: class names of the checkpoint that is evaluated; None: the first data set's names
            are the model's.

    Raises UsageError for classes that are a text instead of a list.
    """
    notes: list[str] = []
    for part in parts:
        for node in datasets_in((cfg.get(f"{part}_dataloader") or {}).get("dataset")):
            _check_form(node, part)
            if (name := _by_name(node, cfg.get("default_scope"))) is None:
                continue
            if node["type"] != BY_NAME[name]:
                node["type"] = BY_NAME[name]
                notes.append(
                    f"the {part} data: {BY_NAME[name]} in place of MMDetection's {name}, which "
                    "takes the classes in the order of the annotation file"
                )
            names = _names(node, name)
            if stored is None:
                stored = names
            if sorted(names) == sorted(stored) and (moved := difference(stored, names)):
                label, wanted, found = moved
                notes.append(
                    f"the {part} data is mapped by class names: class {label} is {wanted!r}, not "
                    f"{found!r} as in its metainfo"
                )
                _reorder(node, names, stored)
    return notes


def check(
    runner: Runner, parts: Sequence[str], stored: Sequence[str] | None = None, path: str = ""
) -> None:
    """Raises UsageError if a label of the loaded data stands for another class than in the model.

    Args:
        parts: as for `settle`.
        stored: class names of the checkpoint at ``path`` that is evaluated or resumed.
    """
    spelling = runner.cfg.get("default_scope") != "mmdet"
    model, where = stored, f"the checkpoint {path}"
    folders: list[str] | None = None
    for part in parts:
        loop = getattr(runner, f"{part}_loop")
        for dataset in [] if loop is None else leaves(loop.dataloader.dataset):
            names = (getattr(dataset, "metainfo", None) or {}).get("classes")
            if not isinstance(names, (list, tuple)):
                continue
            if model is None:
                model, where = names, f"the {part} data"
            if len(names) == len(model) and (found := difference(model, names, spelling=spelling)):
                label, one, other = found
                raise UsageError(
                    f"class {label} is {one!r} in {where} and {other!r} in the {part} data: they "
                    "must have the same classes in the same order"
                )
            _check_file(dataset, names, part)
            folders = _check_folders(dataset, names, part, folders)
        for metric in getattr(getattr(loop, "evaluator", None), "metrics", ()):
            truth = getattr(getattr(metric, "_coco_api", None), "dataset", None)
            if model is not None and truth and type(metric).__name__ == "CocoMetric":
                things = getattr(loop.dataloader.dataset, "things", None)  # of panoptic data
                try:
                    labels_by_name(model[:things], truth["categories"], others=True)
                except UsageError as error:
                    raise UsageError(f"the {part} evaluator's annotation file: {error}") from error


def _check_form(node: dict, part: str) -> None:
    for place, given in (("metainfo.", node.get("metainfo")), ("", node)):
        names = given.get("classes") if isinstance(given, dict) else None
        if isinstance(names, str) and "://" not in names and not os.path.isfile(names):
            raise UsageError(
                f"{part}_dataloader.dataset.{place}classes must be a list of names, or a file with "
                f"one a line, got the text {names!r}: a list of one name is [{names!r}], or "
                f"({names!r},) with the comma"
            )


def _by_name(node: dict, scope: str | None) -> str | None:
    """The name in `BY_NAME` of a data set's type, None for other types."""
    kind = node.get("type")
    if not isinstance(kind, str):  # a class, as configs in pure Python style have it
        kind = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"
    *place, name = kind.split(".")
    ours = kind == BY_NAME.get(name)
    return name if name in BY_NAME and (ours or (place[0] if place else scope) == "mmdet") else None


def _names(node: dict, name: str) -> list[str]:
    names = (node.get("metainfo") or {}).get("classes")
    if names is None:
        place = BY_NAME[name].rpartition(".")[0]  # which needs MMDetection
        names = getattr(import_module(place), name).METAINFO["classes"]
    return list_from_file(names) if isinstance(names, str) else list(names)


def _reorder(node: dict, names: list[str], order: Sequence[str]) -> None:
    metainfo = dict(node.get("metainfo") or {})
    palette = metainfo.get("palette")
    if isinstance(palette, (list, tuple)) and len(palette) == len(names):
        metainfo["palette"] = [palette[names.index(one)] for one in order]
    node["metainfo"] = {**metainfo, "classes": tuple(order)}


def _check_file(dataset: Any, names: Sequence[str], part: str) -> None:
    """For data sets that derive from MMDetection's CocoDataset and number classes as it does."""
    labels, path = getattr(dataset, "cat2label", None), str(getattr(dataset, "ann_file", ""))
    if not labels or type(dataset).__module__ in _OURS or not os.path.isfile(path):
        return
    categories = {one["id"]: one["name"] for one in read_json(path)["categories"]}
    if not set(names) <= set(categories.values()):
        return  # it has its own rule
    for category, label in labels.items():
        if categories.get(category) != names[label]:
            raise UsageError(
                f"the {part} data takes category {categories.get(category)!r} of {path} for class "
                f"{names[label]!r}: {type(dataset).__name__} goes by the order of the file, let it "
                f"derive from {BY_NAME['CocoDataset']}"
            )


def _check_folders(
    dataset: Any, names: Sequence[str], part: str, before: list[str] | None
) -> list[str] | None:
    """For classification data labelled by folder names. Returns the folders of the first part."""
    found = getattr(dataset, "folder_to_idx", None)
    if not found:
        return before
    folders = sorted(found, key=found.get)
    if sorted(names) == folders and (moved := difference(names, folders)):
        label, one, other = moved
        raise UsageError(
            f"class {label} of the {part} data is {one!r}, its folder is {other!r}: "
            "metainfo.classes must be in the order of the folders, which is that of their names"
        )
    same = before if before is not None and len(before) == len(folders) else folders
    if moved := difference(same, folders):
        label, one, other = moved
        raise UsageError(
            f"class {label} is the folder {one!r} of the training data and {other!r} of the {part} "
            "data: all parts must have the same folders"
        )
    return before or folders
