"""Results by class of label maps: a folder of them, or Detectron2's sem_seg_predictions.json."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.mask import decode
from tqdm import tqdm

from elsa_core.data.coco import read_json
from elsa_core.data.label_maps import IGNORE, pair_files, read_labels
from elsa_core.data.mask_rules import mask_problems, rle_of
from elsa_core.data.problems import ERROR, shown
from elsa_core.runtime.errors import UsageError

from .analysis import Analysis, ClassResult, Confusion, ImageResult

# Label map of the annotations [H, W] -> predicted labels [H, W], 0..classes - 1.
Predict = Callable[[np.ndarray], np.ndarray]


def analyse_label_maps(
    annotations: str,
    results: str,
    classes: Sequence[str],
    *,
    images: str | None = None,
    reduce_zero_label: bool = False,
    first_label: int | None = None,
    progress: bool = False,
) -> Analysis:
    """Analyse predicted label maps, pixel by pixel; pixels without a class do not count.

    Args:
        annotations: folder of label maps, PNG.
        results: folder of predicted label maps, PNG, named as those of the annotations or, as
            MMSegmentation writes them, as their last part; or Detectron2's JSON file.
        classes: names by label.
        images: folder of the images, to name and draw them.
        reduce_zero_label: in the annotations, 0 means no class, and classes begin at 1.
        first_label: that stands for the first class in predicted PNGs; None for 1 with
            `reduce_zero_label`, as MMSegmentation writes them, else 0.

    Raises:
        UsageError: files do not pair, differ in size, or have other labels.
    """
    files = dict(_truths(annotations, images))
    first = int(reduce_zero_label) if first_label is None else first_label
    if os.path.isdir(results):
        predictions = _from_folder(results, list(files), len(classes), first)
    else:
        predictions = _from_json(results, list(files), len(classes))
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    ranked = []
    for stem, (name, path) in tqdm(files.items(), "label maps", disable=None if progress else True):
        read = partial(_read, path, predictions[stem], len(classes), reduce_zero_label)
        counts = _counts(*read(), len(classes))
        matrix += counts
        ranked.append(_image(name, counts, classes, partial(_drawn, read, len(classes))))
    if not matrix.any():
        raise UsageError(f"the label maps in {annotations} have no pixel with a class")
    return Analysis(
        task="semantic",
        annotations=annotations,
        summary=_summary(matrix),
        by_class=tuple(_by_class(matrix, classes)),
        by_iou={},
        recalls=np.zeros(0),
        curves={},
        confusion=Confusion(
            tuple(classes),
            matrix,
            "pixels",
            "Pixels with a class are counted by that class and by the class that was found.",
        ),
        images=tuple(sorted(ranked, key=lambda one: (-one.severity, one.file_name))),
        notes=(
            "mIoU is the mean over the classes that have pixels, as in Detectron2; "
            "MMSegmentation's mIoU also counts IoU 0 for classes that have none and were found.",
        ),
    )


def _truths(maps: str, images: str | None) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the stem of each label map, the name of its image, and its path."""
    if images is not None:
        for image, path in pair_files(images, maps):
            if path is not None:
                stem = Path(path).relative_to(maps).with_suffix("").as_posix()
                yield stem, (os.path.relpath(image, images), path)
        return
    found = sorted(path for path in Path(maps).rglob("*.png") if not path.name.startswith("."))
    if not found:
        raise UsageError(f"{maps} has no label maps (*.png)")
    for file in found:
        stem = file.relative_to(maps).with_suffix("").as_posix()
        yield stem, (stem, str(file))


def _paired(results: str, stems: Sequence[str], found: Sequence[str]) -> dict[str, str]:
    """Return {stem: the one of ``found`` whose path ends like it, or is its last part}."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for stem in stems:
        parts = stem.split("/")
        for start in range(len(parts)):
            by_name["/".join(parts[start:])].append(stem)
    paired: dict[str, str] = {}
    for name in found:
        parts = os.path.splitext(name)[0].split("/")
        tails = ["/".join(parts[start:]) for start in range(len(parts))]
        matches = next((by_name[tail] for tail in tails if tail in by_name), [])
        if len(matches) != 1:
            what = f"fits {len(matches)} label maps" if matches else "fits no label map"
            raise UsageError(f"{results}: {shown(name)} {what} of the annotations by its name")
        if matches[0] in paired:
            raise UsageError(f"{results} has two results for label map {matches[0]}")
        paired[matches[0]] = name
    if missing := [stem for stem in stems if stem not in paired]:
        raise UsageError(
            f"{results} lacks results for {len(missing)} of {len(stems)} label maps, the first is "
            f"{missing[0]}"
        )
    return paired


def _from_folder(folder: str, stems: Sequence[str], classes: int, first: int) -> dict[str, Predict]:
    files = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.png"))
    if not files:
        raise UsageError(f"{folder} has no label maps (*.png)")

    def read(name: str, truth: np.ndarray) -> np.ndarray:
        path = os.path.join(folder, name)
        labels = read_labels(path, path, classes, bool(first), size=truth.shape)
        if (labels == IGNORE).any():
            raise UsageError(
                f"predicted labels must be {first}..{classes + first - 1}, got {first and 0 or 255}"
                f" in {path}" + " (--first-label 0 takes maps whose labels begin at 0)" * first
            )
        return labels

    return {stem: partial(read, name) for stem, name in _paired(folder, stems, files).items()}


def _from_json(path: str, stems: Sequence[str], classes: int) -> dict[str, Predict]:
    entries = read_json(path)
    form = "entries with file_name, category_id and segmentation, as sem_seg_predictions.json"
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise UsageError(f"{path} has no label maps: they are {form}")
    by_file: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in entries:
        name, label = one.get("file_name"), one.get("category_id")
        if not isinstance(name, str) or type(label) is not int or not one.get("segmentation"):
            raise UsageError(f"{path} has no label maps: they are {form}")
        if not 0 <= label < classes:
            raise UsageError(f"labels must be 0..{classes - 1}, got {label} for {shown(name)}")
        by_file[name].append(one)

    def draw(name: str, truth: np.ndarray) -> np.ndarray:
        height, width = truth.shape
        labels, covered = np.zeros_like(truth), np.zeros(truth.shape, dtype=np.int64)
        for one in by_file[name]:
            found = mask_problems(one, f"class {one['category_id']} of {name}", width, height, True)
            if problem := next((str(it) for it in found if it.level == ERROR), None):
                raise UsageError(problem)
            mask = decode(rle_of(one["segmentation"], width, height)).astype(bool)
            labels[mask] = one["category_id"]
            covered += mask
        if (covered != 1).any():
            raise UsageError(f"{path} must give one class to each pixel of {shown(name)}")
        return labels

    return {stem: partial(draw, name) for stem, name in _paired(path, stems, list(by_file)).items()}


def _read(path: str, predict: Predict, classes: int, reduce: bool) -> tuple[np.ndarray, np.ndarray]:
    truth = read_labels(path, path, classes, reduce)
    return truth, predict(truth)


def _counts(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    valid = truth != IGNORE
    pairs = truth[valid].astype(np.int64) * classes + found[valid]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _drawn(
    read: Callable[[], tuple[np.ndarray, np.ndarray]], classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return both label maps for drawing, with label ``classes`` where there is none."""
    truth, found = read()
    return np.where(truth == IGNORE, classes, truth), found


def _summary(matrix: np.ndarray) -> dict[str, float | None]:
    right, truth, found = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    union, there = truth + found - right, truth > 0
    iou, accuracy = right[there] / union[there], right[there] / truth[there]
    scores = {
        "mIoU": iou.mean(),
        "mIoU (MMSegmentation)": iou.sum() / (union > 0).sum(),
        "mAcc": accuracy.mean(),
        "aAcc": right.sum() / truth.sum(),
        "fwIoU": (iou * truth[there]).sum() / truth.sum(),
    }
    return {name: round(100 * float(value), 10) for name, value in scores.items()}


def _by_class(matrix: np.ndarray, classes: Sequence[str]) -> Iterator[ClassResult]:
    for label, name in enumerate(classes):
        right = 100 * int(matrix[label, label])
        truth, found = int(matrix[label].sum()), int(matrix[:, label].sum())
        scores = {
            "IoU": right / (truth + found - right // 100) if truth else None,
            "accuracy": right / truth if truth else None,
            "precision": right / found if truth and found else None,
        }
        yield ClassResult(name, truth, found, scores)


def _image(
    name: str, counts: np.ndarray, classes: Sequence[str], drawn: Callable[[], Any]
) -> ImageResult:
    """Return an image, whose severity is the percentage of wrong pixels."""
    total, right = int(counts.sum()), int(counts.trace())
    severity = 100 * (total - right) / total if total else 0.0
    text = f"right: {right:,} of {total:,} pixels"
    for truth, found, number in Confusion(tuple(classes), counts, "", "").confused(1):
        text += f"; mostly {truth} found as {found} ({number:,})"
    return ImageResult(name, severity, text, drawn)
