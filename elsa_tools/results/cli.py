"""The command ``elsa analyze results``."""

from __future__ import annotations

import argparse
import json

from elsa_core.runtime.command_line import keep_inputs, show
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing

from .analysis import Analysis

DETAILS = """\
A results file is Detectron2's coco_instances_results.json, or what MMDetection's metrics write with
outfile_prefix: *.bbox.json or *.segm.json.
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
    parser.add_argument("--annotations", required=True, metavar="FILE", help="COCO file")
    parser.add_argument("--results", required=True, metavar="FILE", help="detections")
    parser.add_argument(
        "--task",
        choices=("auto", "bbox", "segm"),
        default="auto",
        help="auto: what the results have, boxes, masks or both (default: %(default)s)",
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="those to evaluate; default: all categories"
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
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    parser.set_defaults(run=_results, packages=("numpy", "pycocotools", "tabulate"))


def _results(options: argparse.Namespace) -> int:
    from .table import text

    if options.json:
        keep_inputs("--json", options.json, [options.annotations, options.results])
    analyses = _analyse(options)
    for analysis in analyses:
        show(text(analysis) + "\n")
    if options.json:
        content = {analysis.task: analysis.record() for analysis in analyses}
        with replacing(options.json) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
    return 0


def _analyse(options: argparse.Namespace) -> list[Analysis]:
    from .detections import analyse_detections
    from .read import read_results, tasks_of

    entries = read_results(options.results)
    if not entries:
        raise UsageError(f"{options.results} has no detections")
    tasks = tasks_of(entries) if options.task == "auto" else [options.task]
    if not tasks:
        raise UsageError(f"{options.results} has detections without a box and without a mask")
    return [
        analyse_detections(
            options.annotations,
            entries,
            task,
            classes=options.classes,
            iou=options.iou,
            score=options.score,
        )
        for task in tasks
    ]
