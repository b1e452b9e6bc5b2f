"""The command ``elsa analyze results``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from elsa_core.runtime.command_line import keep_inputs, show
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import make_folder, replacing

from .analysis import Analysis

PAGE = "results.html"
PACKAGES = (
    "numpy",
    "PIL",
    "pycocotools",
    "tabulate",
    "tqdm",
    "jinja2",
    "matplotlib",
    "supervision",
)
DETAILS = """\
Results are Detectron2's coco_instances_results.json, or what MMDetection's metrics write with
outfile_prefix: *.bbox.json or *.segm.json. Of label maps they are Detectron2's
sem_seg_predictions.json, or the folder that MMSegmentation's IoUMetric writes with output_dir.
"""


def add_results(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "results",
        help="what a model finds and misses, by class",
        description="Average precision by class, size and IoU, the confusion matrix and the worst "
        "mistakes, from a results file of either framework.",
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--annotations", required=True, metavar="PATH", help="COCO file, or folder of label maps"
    )
    parser.add_argument(
        "--results", required=True, metavar="PATH", help="file, or folder of label maps"
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images")
    parser.add_argument(
        "--task",
        choices=("auto", "bbox", "segm", "semantic"),
        default="auto",
        help="auto: what the results have: boxes, masks or both; semantic if --annotations is a "
        "folder (default: %(default)s)",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="those of the model; needed for label maps, default of a COCO file: all categories",
    )
    parser.add_argument(
        "--iou",
        type=float,
        default=0.5,
        help="0.5, 0.55, ... 0.95, for the confusion matrix and the curves (default: %(default)s)",
    )
    parser.add_argument(
        "--score",
        type=float,
        help="least score of a detection for the confusion matrix; default: that of the best F1",
    )
    parser.add_argument(
        "--reduce-zero-label",
        action="store_true",
        help="in the annotated label maps 0 is no class, and classes begin at 1",
    )
    parser.add_argument(
        "--first-label",
        type=int,
        choices=(0, 1),
        help="of the first class in predicted PNGs; default: 1 with --reduce-zero-label, else 0",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help=f"also write {PAGE}: the same with curves and, with --images, the worst and best "
        "images",
    )
    parser.set_defaults(run=_results, packages=PACKAGES)


def _results(options: argparse.Namespace) -> int:
    from .table import text

    page = os.path.join(options.out, PAGE) if options.out else None
    for option, path in (("--json", options.json), ("--out", page)):
        if path:
            keep_inputs(option, path, [options.annotations, options.results])
    if options.images and not os.path.isdir(options.images):
        raise UsageError(f"--images must be a folder, got {options.images}")
    analyses = _analyse(options)
    for analysis in analyses:
        show(text(analysis) + "\n")
    if page:
        _write_page(page, analyses, options)
    if options.json:
        content = {analysis.task: analysis.record() for analysis in analyses}
        with replacing(options.json) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
    return 0


def _write_page(page: str, analyses: list[Analysis], options: argparse.Namespace) -> None:
    from .report import write_report

    make_folder(options.out, "--out")
    images = Path(options.images) if options.images else None
    title = f"Results of {os.path.basename(os.path.abspath(options.results))}"
    write_report(Path(page), analyses, images=images, title=title)
    show(f"wrote: {page}")


def _analyse(options: argparse.Namespace) -> list[Analysis]:
    if os.path.isdir(options.annotations) or options.task == "semantic":
        return [_label_maps(options)]
    from .detections import analyse_detections
    from .read import read_results, tasks_of

    entries = read_results(options.results)
    if not entries:
        raise UsageError(f"{options.results} has no detections")
    tasks = tasks_of(entries) if options.task == "auto" else [options.task]
    if not tasks:
        raise UsageError(f"{options.results} has detections without a box and without a mask")
    given = {"classes": options.classes, "iou": options.iou, "score": options.score}
    return [analyse_detections(options.annotations, entries, task, **given) for task in tasks]


def _label_maps(options: argparse.Namespace) -> Analysis:
    from .label_maps import analyse_label_maps

    if not os.path.isdir(options.annotations) or options.task not in ("auto", "semantic"):
        raise UsageError(
            f"task {options.task} does not go with --annotations {options.annotations}: semantic "
            "is for a folder of label maps, the others are for a COCO file"
        )
    if not options.classes:
        raise UsageError("--classes must name the classes of label maps, in the order of labels")
    return analyse_label_maps(
        options.annotations,
        options.results,
        options.classes,
        images=options.images,
        reduce_zero_label=options.reduce_zero_label,
        first_label=options.first_label,
        progress=True,
    )
