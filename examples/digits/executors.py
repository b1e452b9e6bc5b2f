"""Compares what the demo's trained models find in both frameworks and in every exported form."""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from tqdm import tqdm

from elsa_core.runtime.command_line import exit_status
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing
from elsa_core.weights.files import convert_file
from elsa_tools.export.build import wrap
from elsa_tools.export.record import record_of
from elsa_tools.export.verify import AGREEMENT
from elsa_tools.export.write import write_model
from elsa_tools.predict.coco import CocoResults
from elsa_tools.predict.executors import ENDINGS
from elsa_tools.predict.inferencer import Inferencer
from elsa_tools.predict.inputs import read_image
from elsa_tools.predict.load import load_exported, load_inferencer
from elsa_tools.predict.results import Detections, Result, Segmentation
from elsa_tools.verify.compare import MAX_PIXELS, MAX_SCORE, MIN_IOU, Outcome, match
from elsa_tools.verify.ties import TiesByIndex

from .trainings import DETECTRON2, MMDETECTION, MMSEGMENTATION, REPOSITORY, TRAININGS, Training

# How much the average precision of two executors may differ, of 1.
MAX_AP = 1e-4
# Unmet detections that are listed, of each row.
LISTED = 5
EXECUTORS = {".onnx": "onnxruntime", ".pt2": "torch.export", ".xml": "OpenVINO"}


@dataclass(frozen=True)
class Subject:
    """A trained model.

    Attributes:
        training: that it comes from; its framework's results are the reference.
        other, other_config: the other framework, and the same model's config there.
        target: what its weights are converted to.
        sizes: of the shorter side of the resized images.
        anchor_sizes: of a level of a detector's pyramid.
    """

    training: Training
    other: str
    other_config: str
    target: str
    sizes: tuple[int, ...]
    anchor_sizes: int | None = None


DETECTION_SIZES, SEGMENTATION_SIZES = (128, 160, 224), (96, 128, 160)
UPERNET = "configs/detectron2/digits/upernet_elsa_swin_digits.yaml"
SUBJECTS = {
    subject.training.name: subject
    for subject in (
        Subject(DETECTRON2, "MMDetection", MMDETECTION.config, "mmdet", DETECTION_SIZES, 2),
        Subject(MMDETECTION, "Detectron2", DETECTRON2.config, "detectron2", DETECTION_SIZES, 2),
        Subject(MMSEGMENTATION, "Detectron2", UPERNET, "detectron2", SEGMENTATION_SIZES),
    )
}


@dataclass
class Row:
    """What one executor finds, beside the reference.

    Attributes:
        met, total: detections that are met one to one, or pixels with the same class.
        box, score, iou: largest differences, and the least IoU, of detections of one object.
        precision: box and mask AP.
        seconds: of an image, from its pixels to its results; the median.
        kept: whether what is promised of exported models holds; None: a framework.
        unmet: a sentence on some of the detections that are not met.
    """

    model: str
    size: int
    executor: str
    batch: int
    met: int = 0
    total: int = 0
    box: float = 0.0
    score: float = 0.0
    iou: float = 1.0
    precision: tuple[float, float] | None = None
    seconds: float = 0.0
    kept: bool | None = None
    unmet: list[str] = field(default_factory=list)

    def keeps(self, reference: "Row") -> bool:
        """Whether what is promised of exported models holds."""
        if self.precision is None or reference.precision is None:
            return self.met >= AGREEMENT * self.total
        near = np.allclose(self.precision, reference.precision, rtol=0, atol=MAX_AP)
        return self.met == self.total and bool(near)


@dataclass(frozen=True)
class Held:
    """The held-out images, in order, and their annotations."""

    paths: tuple[str, ...]
    images: tuple[np.ndarray, ...]
    annotations: str

    @staticmethod
    def read(data: Path, number: int | None) -> "Held":
        files = sorted((data / "images" / "validation").glob("*.jpg"))[:number]
        if not files:
            raise UsageError(f"{data} has no held-out images: `make demo` makes them")
        images = tuple(read_image(str(file)) for file in files)
        annotations = data / "annotations" / "instances_validation.json"
        return Held(tuple(map(str, files)), images, str(annotations))

    def precision(self, classes: Sequence[str], results: Sequence[Result]) -> tuple[float, float]:
        """Box and mask AP of detections in all images."""
        coco = CocoResults(self.annotations, classes)
        for path, found in zip(self.paths, results, strict=True):
            assert isinstance(found, Detections)
            coco.add(path, found)
        if not coco.entries:
            return 0.0, 0.0
        ids = [coco.image_id(path) for path in self.paths]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(self.annotations)
            box, mask = (_average(truth, coco.entries, ids, kind) for kind in ("bbox", "segm"))
        return box, mask


def _average(truth: Any, entries: list[dict[str, Any]], ids: list[int], kind: str) -> float:
    if kind == "bbox":  # a mask would replace the box
        entries = [{k: v for k, v in one.items() if k != "segmentation"} for one in entries]
    evaluation = COCOeval(truth, truth.loadRes(entries), kind)
    evaluation.params.imgIds = ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def compare_subject(
    subject: Subject, checkpoint: str, held: Held, options: argparse.Namespace, folder: str
) -> Iterator[Row]:
    """A row of each executor, size and batch.

    The reference is the framework that the model was trained in, with ties in the order of index.
    """
    training = subject.training
    config = str(training.config_path)
    own = load_inferencer(config, checkpoint, device="cpu")
    files = {}
    for ending in _endings():
        path = os.path.join(folder, f"{training.name}{ending}")
        write_model(wrap(own), record_of(own), path, verified=False)
        files[EXECUTORS[ending]] = path
    converted = os.path.join(folder, f"{training.name}.pth")
    convert_file(checkpoint, converted, subject.target, anchor_sizes=subject.anchor_sizes)
    model = f"{training.task}, {training.framework}"
    for size in subject.sizes if options.sizes is None else options.sizes:
        own = load_inferencer(config, checkpoint, device="cpu", options=_resized(config, size))
        reference = Row(model, size, "reference", 1)
        with TiesByIndex():
            wanted = list(_predictions(own, held, reference))
        _compared(reference, own, held, wanted, wanted)

        row = Row(model, size, training.framework, 1)
        yield _compared(row, own, held, _predictions(own, held, row), wanted)
        other_config = str(REPOSITORY / subject.other_config)
        changes = _resized(other_config, size)
        other = load_inferencer(other_config, converted, device="cpu", options=changes)
        row = Row(model, size, subject.other, 1)
        yield _compared(row, own, held, _predictions(other, held, row), wanted)

        for executor, path in files.items():
            exported = load_exported(path, threads=options.threads)
            exported.record = dataclasses.replace(exported.record, resize=own.resize())
            for batch in options.batches:
                row = Row(model, size, executor, batch)
                found = _predictions(exported, held, row, exported.predict_batch)
                _compared(row, own, held, found, wanted)
                row.kept = row.keeps(reference)
                yield row


def _endings() -> Iterator[str]:
    """Those of the formats that are installed."""
    for ending in ENDINGS:
        if ending != ".xml" or find_spec("openvino"):
            yield ending


def _resized(config: str, size: int) -> list[str]:
    """Options for a test resize to ``size``."""
    if config.endswith(".yaml"):
        return ["INPUT.MIN_SIZE_TEST", str(size)]
    return [f"test_dataloader.dataset.pipeline.1.scale=(1333,{size})"]


def _predictions(
    inferencer: Inferencer,
    held: Held,
    row: Row,
    of_batch: Callable[[Sequence[np.ndarray]], list[Any]] | None = None,
) -> Iterator[Result]:
    """What is found in each image; ``row`` gets the seconds."""
    predict = of_batch or (lambda images: [inferencer.predict(image) for image in images])
    name = f"{row.model}, {row.size}: {row.executor}, batch {row.batch}"
    seconds = []
    with tqdm(total=len(held.images), desc=name, unit="image", disable=None) as bar:
        for start in range(0, len(held.images), row.batch):
            images = held.images[start : start + row.batch]
            begin = time.perf_counter()
            found = predict(images)
            seconds.append((time.perf_counter() - begin) / len(images))
            yield from found
            bar.update(len(images))
    row.seconds = median(seconds[1:] or seconds)


def _compared(
    row: Row, own: Inferencer, held: Held, found: Iterable[Result], wanted: Sequence[Result]
) -> Row:
    results = []
    for path, got, reference in zip(held.paths, found, wanted, strict=True):
        if isinstance(got, Segmentation):
            assert isinstance(reference, Segmentation)
            row.met += int((got.labels == reference.labels).sum())
            row.total += got.labels.size
        else:
            assert isinstance(reference, Detections)
            _count(row, os.path.basename(path), got, reference)
            results.append(got)
    if results:
        row.precision = held.precision(own.classes, results)
    return row


def _count(row: Row, name: str, got: Detections, wanted: Detections) -> None:
    """Adds the detections of one image to a row."""
    pairs = match(_outcome(got), _outcome(wanted))
    row.total += max(len(got.boxes), len(wanted.boxes))
    met = []
    for i, j in pairs:
        box = float(np.abs(got.boxes[i] - wanted.boxes[j]).max())
        score = float(abs(got.scores[i] - wanted.scores[j]))
        iou = 1.0
        if got.masks is not None and wanted.masks is not None:
            union = (got.masks[i] | wanted.masks[j]).sum()
            iou = float((got.masks[i] & wanted.masks[j]).sum() / union) if union else 1.0
        row.box, row.score, row.iou = max(row.box, box), max(row.score, score), min(row.iou, iou)
        if box <= MAX_PIXELS and score <= MAX_SCORE and iou >= MIN_IOU:
            met.append((i, j))
        else:
            where = _place(wanted, j)
            row.unmet.append(f"{name}: {where}: box {box:.3g}, score {score:.3g}, IoU {iou:.4g}")
    row.met += len(met)
    row.unmet += [
        f"{name}: {_place(side, index)}: {of} alone"
        for of, side, paired in (
            ("the executor's", got, {i for i, _ in pairs}),
            ("the reference's", wanted, {j for _, j in pairs}),
        )
        for index in range(len(side.boxes))
        if index not in paired
    ]


def _outcome(found: Detections) -> Outcome:
    boxes, scores, labels = map(torch.from_numpy, (found.boxes, found.scores, found.labels))
    return Outcome({}, boxes=boxes, scores=scores, labels=labels)


def _place(found: Detections, index: int) -> str:
    corners = ", ".join(f"{value:.2f}" for value in found.boxes[index])
    return f"class {found.labels[index]}, score {found.scores[index]:.6f}, box {corners}"


_KEPT = {True: "yes", False: "no", None: "-"}


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    cells = []
    for row in rows:
        detector = row.precision is not None
        precision = [f"{100 * value:.2f}" for value in row.precision or ()] or ["-", "-"]
        differences = [f"{row.box:.1e}", f"{row.score:.1e}", f"{row.iou:.4f}"]
        share = f"{row.met / row.total:.4%}" if row.total else "-"
        cells.append(
            [row.model, row.size, row.executor, row.batch]
            + [share, row.total, *(differences if detector else ["-"] * 3), *precision]
            + [f"{1e3 * row.seconds:.1f}", _KEPT[row.kept]]
        )
    headers = ["model", "size", "executor", "batch", "met", "of", "box (px)", "score", "mask IoU"]
    headers += ["box AP", "mask AP", "ms an image", "kept"]
    align = ["left", "right", "left", *["right"] * (len(headers) - 3)]
    return str(tabulate(cells, headers, tablefmt="pipe", disable_numparse=True, colalign=align))


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    held = Held.read(options.data, options.images)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or SUBJECTS:
            subject = SUBJECTS[name]
            checkpoint = subject.training.checkpoint(options.demo / name)
            if checkpoint is None:
                raise UsageError(f"{options.demo / name} has no checkpoint: `make demo` trains it")
            rows += compare_subject(subject, str(checkpoint), held, options, folder)
    lines = [table(rows), ""]
    for row in rows:
        lines += [
            f"- {row.model}, {row.size}, {row.executor}, batch {row.batch}: {one}"
            for one in row.unmet[:LISTED]
        ]
    text = "\n".join(lines).strip()
    print(text)
    if options.out is not None:
        with replacing(options.out) as file:
            file.write(text.encode() + b"\n")
    return 1 if any(row.kept is False for row in rows) else 0


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.executors",
        description="Compares what the models of `make demo` find in the held-out images in both "
        "frameworks and, exported, in every executor that is installed. Exit status 1: an "
        "exported model finds something else.",
    )
    parser.add_argument(
        "--demo", type=Path, default=REPOSITORY / "demo_out", help="default: demo_out"
    )
    parser.add_argument(
        "--data", type=Path, default=REPOSITORY / "data" / "digits", help="default: data/digits"
    )
    parser.add_argument("--images", type=_positive, metavar="N", help="default: all")
    parser.add_argument(
        "--sizes", type=_positive, nargs="+", help="default: 128, 160 and 224; UPerNet 96, 128, 160"
    )
    parser.add_argument(
        "--batches", type=_positive, nargs="+", default=[1, 4], help="default: 1 and 4"
    )
    parser.add_argument("--threads", type=_positive, default=1, help="default: 1")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(SUBJECTS),
        metavar="NAME",
        help=f"only these of {', '.join(training.name for training in TRAININGS)}",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, too")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main(arguments: list[str] | None = None) -> int:
    options = parse_args(arguments)
    return exit_status("executors", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
