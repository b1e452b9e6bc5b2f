"""The command line of tools/demo.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from elsa_core.runtime.command_line import exit_status, say, show
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import make_folder, sweep
from elsa_tools.arguments import add_config_settings, command_parser

DETAILS = """\
The config says the framework: .yaml is Detectron2, .py MMDetection or MMSegmentation. CHECKPOINT
may come from the other framework or from the original release; nothing in it is executed.

DIR gets a picture of each image (NAME.jpg), a label map (NAME_labels.png) for segmentation, a video
(NAME.mp4) for each video, and results.json for all of them. docs/inference.md explains its fields.
With --coco, coco_results.json has the objects in COCO's results format, for pycocotools' loadRes.

exit status: 0 done, 1 some inputs could not be processed (each is named, the others are done), 2 an
error (one sentence on standard error), 130 interrupted
"""


PACKAGES = ("cv2", "pycocotools", "tqdm")


def main(arguments: Sequence[str] | None = None, prog: str = "demo.py") -> int:
    options = parse_arguments(arguments, prog)
    kept = f"interrupted, the files in {options.out} are complete, results.json is not of this run"
    return exit_status(prog.removesuffix(".py"), lambda: run(options), kept, PACKAGES)


def parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(prog, "Show what a trained model finds in images and videos.", DETAILS)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image, video, folder or quoted pattern"
    )
    parser.add_argument("--config", required=True, help="file, or configs/... of the package")
    parser.add_argument("--weights", required=True, metavar="CHECKPOINT")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="S",
        help="objects with a lower score are left out, default: 0.5",
    )
    parser.add_argument(
        "--coco",
        metavar="ANNOTATIONS",
        help="also write coco_results.json, with the ids of images and categories in this file",
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    add_config_settings(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    if not 0 <= options.score_threshold <= 1:
        raise UsageError(f"--score-threshold must be in [0, 1], got {options.score_threshold}")
    from tqdm import tqdm

    from .coco import CocoResults
    from .inputs import find_inputs
    from .load import load_inferencer
    from .outputs import check_folder, write_json
    from .runs import Demo

    files = find_inputs(options.inputs)
    check_folder(options.out, [*files, *filter(None, [options.coco])])
    make_folder(options.out, "--out")
    sweep(options.out)  # what killed processes have left
    inferencer = load_inferencer(
        options.config, options.weights, device=options.device, options=options.options
    )
    if inferencer.note:
        say("demo", inferencer.note)
    coco = None
    if options.coco is not None:
        if inferencer.task != "detection":
            raise UsageError(f"--coco needs a detector, got a model for {inferencer.task}")
        coco = CocoResults(options.coco, inferencer.classes)
        for file in files:
            coco.image_id(file)  # before anything is written
    demo = Demo(inferencer, options.out, options.score_threshold, coco)
    for file in tqdm(files, unit="file", disable=None):  # None: on a terminal only
        demo.process(file)
    record = {
        "schema": 1,
        "framework": inferencer.framework,
        "task": inferencer.task,
        "config": options.config,
        "weights": options.weights,
        "classes": inferencer.classes,
        "score_threshold": options.score_threshold if inferencer.task == "detection" else None,
        "images": demo.images,
        "videos": demo.videos,
        "failed": demo.failed,
    }
    if coco is not None:
        write_json(os.path.join(options.out, "coco_results.json"), coco.entries)
    path = os.path.join(options.out, "results.json")
    write_json(path, record)
    done = len(demo.images) + len(demo.videos)
    show(f"wrote: {path} and the pictures of {done} of {len(files)} inputs")
    for failure in demo.failed:
        say("demo", failure["reason"])
    return 1 if demo.failed else 0
