"""The command line of ``elsa fit``."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from elsa_core.runtime.command_line import exit_status, say
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.packages import is_missing, missing
from elsa_core.runtime.trackers import TRACKERS
from elsa_tools.arguments import command_parser

from .choose import MODELS
from .dataset import TASKS
from .frameworks import FRAMEWORKS

PACKAGES = (
    "PIL",
    "jinja2",
    "matplotlib",
    "psutil",
    "pycocotools",
    "supervision",
    "tabulate",
    "tqdm",
    "yaml",
)
DETAILS = """\
examples:
  look first                elsa fit my_images --dry-run
  five minutes on a laptop  elsa fit my_images --minutes 5
  boxes, in MMDetection     elsa fit my_images --task boxes --framework mmdet
  from trained weights      elsa fit my_images --weights elsa_swin_tiny.pth --model t

DATA is a folder of images with annotations: COCO JSON (also of Roboflow, CVAT, Label Studio), YOLO
with data.yaml, Pascal VOC, or label maps. docs/fit-data.md says how each is recognised, docs/fit.md
by which rules the settings are chosen.

The folder OUT gets config.yaml or config.py, a plain config of the framework; best.pth; the folder
training with logs and checkpoints; and report.html. The same command goes on where it was
interrupted.

exit status: 0 done, 2 an error (one sentence on standard error), 130 interrupted, 143 or 138
stopped by SIGTERM or SIGUSR1
"""


class Stopped(SystemExit):
    """SIGTERM or SIGUSR1 arrived."""


def main(arguments: Sequence[str] | None = None, prog: str = "elsa fit") -> int:
    options = parse_arguments(arguments, prog)
    goes_on = "interrupted; the same command goes on from here"
    before = {n: signal.signal(n, _stop) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return exit_status(prog, lambda: run(options), goes_on, PACKAGES)
    except Stopped as stop:
        say(prog, "stopped; the same command goes on from here")
        return int(stop.code)  # type: ignore[arg-type]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(prog, "Train a model on a folder of annotated images.", DETAILS)
    parser.add_argument("data", metavar="DATA", type=Path, help="folder, or its data.yaml")
    parser.add_argument(
        "--framework",
        choices=list(FRAMEWORKS),
        help="default: detectron2 if it is installed, else that of OpenMMLab for the task",
    )
    parser.add_argument(
        "--model",
        choices=list(MODELS),
        help="default: t with --weights on a GPU, else small, which a CPU can train",
    )
    parser.add_argument("--task", choices=TASKS, help="default: what the annotations allow")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="checkpoint to start from")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="time for everything, evaluations included"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="images of an iteration")
    parser.add_argument(
        "--layer-decay",
        type=float,
        metavar="F",
        help="factor of the learning rate from one layer of the backbone to the one before, "
        "default: 0.9 with --weights, else 1",
    )
    parser.add_argument(
        "--backbone-factor",
        type=float,
        default=1.0,
        metavar="F",
        help="factor of the backbone's learning rate, default: 1",
    )
    parser.add_argument(
        "--validation",
        type=float,
        default=0.2,
        metavar="PART",
        help="part of the images that validates, where DATA has none for it, default: 0.2",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read images")
    parser.add_argument(
        "--trackers",
        nargs="+",
        choices=list(TRACKERS),
        default=[],
        metavar="NAME",
        help=f"also log to {' or '.join(TRACKERS)}; TensorBoard's files are always written",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/ + DATA's name")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say the choices and write the config; with --minutes, measures the speed",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    if absent := [name for name in PACKAGES if is_missing(name)]:  # some are needed at the end
        raise UsageError(missing(absent))
    from .run import Fit, Request

    values = {name: value for name, value in vars(options).items() if name != "dry_run"}
    values["out"] = options.out or Path("runs", options.data.resolve().name)
    try:
        Fit(Request(**values))(options.dry_run)
    except OSError as error:  # such as a full disk
        raise UsageError(f"{error.filename or options.data}: {error.strerror or error}") from error
    return 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(128 + number)
