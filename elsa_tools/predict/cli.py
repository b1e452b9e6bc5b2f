"""The command line of tools/demo.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from elsa_core.runtime.command_line import exit_status, say, show
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import make_folder, sweep
from elsa_tools.arguments import add_config_settings, command_parser

from .inferencer import Inferencer

DETAILS = """\
The model is a file that 'elsa export' has written (--model), which needs neither framework, or a
config and a checkpoint. The config says the framework: .yaml is Detectron2, .py MMDetection or
MMSegmentation. CHECKPOINT may come from the other framework or from the original release; nothing
in it is executed.

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
    parser.add_argument("--config", help="file, or configs/... of the package")
    parser.add_argument("--weights", metavar="CHECKPOINT")
    parser.add_argument(
        "--model", metavar="FILE", help="an exported model, .onnx, .pt2 or .xml, in place of both"
    )
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
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of the model on the CPU, default: its library's"
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="run a .pt2 file of AOTInductor, too: machine code, which cannot be checked",
    )
    add_config_settings(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    if not 0 <= options.score_threshold <= 1:
        raise UsageError(f"--score-threshold must be in [0, 1], got {options.score_threshold}")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads must be at least 1, got {options.threads}")
    source = _source(options)
    from tqdm import tqdm

    from .coco import CocoResults
    from .inputs import find_inputs
    from .outputs import check_folder, write_json
    from .runs import Demo

    files = find_inputs(options.inputs)
    check_folder(options.out, [*files, *filter(None, [options.coco, options.model])])
    make_folder(options.out, "--out")
    sweep(options.out)  # what killed processes have left
    inferencer = _load(options)
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
        **source,
        "classes": inferencer.classes,
        "score_threshold": options.score_threshold if inferencer.task == "detection" else None,
        "images": demo.images,
        "videos": demo.videos,
        "failed": demo.failed,
        "time": (times := demo.times.record()),
    }
    if coco is not None:
        write_json(os.path.join(options.out, "coco_results.json"), coco.entries)
    path = os.path.join(options.out, "results.json")
    write_json(path, record)
    done = len(demo.images) + len(demo.videos)
    sentence = f"wrote: {path} and the pictures of {done} of {len(files)} inputs"
    if times is not None:
        sentence += f"; {times['image_ms']:.0f} ms an image, the model {times['model_ms']:.0f} ms"
    show(sentence)
    for failure in demo.failed:
        say("demo", failure["reason"])
    return 1 if demo.failed else 0


def _source(options: argparse.Namespace) -> dict[str, str]:
    """The files of the model by option. Raises UsageError unless they are given in one way."""
    given = {
        name: value
        for name in ("config", "weights", "model")
        if (value := getattr(options, name)) is not None
    }
    if set(given) not in ({"config", "weights"}, {"model"}):
        names = " and ".join(f"--{name}" for name in given) or "none"
        raise UsageError(f"the model must be --model, or --config and --weights, got {names}")
    if options.model is not None and options.options:
        raise UsageError("--opts belongs to --config, an exported model has no settings")
    if options.compiled and options.model is None:
        raise UsageError("--compiled belongs to --model")
    return given


def _load(options: argparse.Namespace) -> Inferencer:
    from .load import load_exported, load_inferencer

    if options.model is not None:
        return load_exported(
            options.model,
            device=options.device,
            threads=options.threads,
            compiled=options.compiled,
        )
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    return load_inferencer(
        options.config, options.weights, device=options.device, options=options.options
    )
