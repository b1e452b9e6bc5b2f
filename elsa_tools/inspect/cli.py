"""The command line of tools/analyze.py."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence

from elsa_core.runtime.command_line import exit_status, keep_inputs, show
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing
from elsa_tools.archs import NAMES
from elsa_tools.arguments import command_parser
from elsa_tools.results.cli import add_results

DETAILS = """\
examples:
  analyze.py parts --arch tiny --size 800 1344
  analyze.py parts configs/mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py
  analyze.py filters model_final.pth --image photo.jpg --pixel 120,80 300,200 --out filters.png
  analyze.py results --annotations instances_val.json --results coco_instances_results.json

exit status: 0 done, 1 a run that failed, 2 an error (one sentence on standard error), 130
interrupted
"""
FILTERS_DETAILS = """\
The picture shows, over the image and enlarged, what a block of ELSA multiplies its neighbourhood's
values by: the attention, the ghost filters that are the same everywhere, and both together. The
neighbourhood of an ELSA-Swin's stage 1 has K x 4 pixels a side, of each later stage twice as many;
the last stage has window attention and no such filters. Of an ELSA-VOLO only stage 1 has them, with
K x 8 pixels a side. Stages, blocks, heads and channels are counted from 1.
"""


def main(arguments: Sequence[str] | None = None, prog: str = "analyze.py") -> int:
    options = parse_arguments(arguments, prog)
    tool = prog.removesuffix(".py")
    return exit_status(tool, lambda: options.run(options), packages=options.packages)


def parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(
        prog,
        "Show the parts of a model, what ELSA attends to in an image, and results by class.",
        DETAILS,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_parts(commands)
    _add_filters(commands)
    add_results(commands)
    return parser.parse_args(arguments)


def _add_parts(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "parts",
        help="parameters and multiply-adds of each part",
        description="Parameters and multiply-adds (FLOPs in papers) of each part of a model. Of a "
        "two-stage detector, 1000 proposals go through the box heads and 100 through the mask "
        "heads. Heads that only train have parameters and no operations.",
    )
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help=".yaml of Detectron2 or .py of OpenMMLab"
    )
    parser.add_argument(
        "--arch", help=f"a bare backbone: {', '.join(NAMES)}, or a dict as in a config"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="height and width of the image in pixels; default: 224 224 for backbones and "
        "classifiers, 800 1280 for detectors, 512 2048 for segmentation",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    parser.set_defaults(run=_parts, packages=())


def _add_filters(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "filters",
        help="a picture of what ELSA attends to",
        description="Draws the filters that ELSA applies at some pixels of an image.",
        epilog=FILTERS_DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="of any framework, or of the original release; its architecture is recognised",
    )
    parser.add_argument("--arch", help="instead of a checkpoint: an untrained backbone, see parts")
    parser.add_argument("--image", required=True, help="file of an image")
    parser.add_argument(
        "--pixel",
        nargs="+",
        type=_pixel,
        metavar="X,Y",
        help="pixels of the image, from its upper left corner; default: a grid of six",
    )
    parser.add_argument("--stage", type=int, default=1, help="default: 1")
    parser.add_argument("--block", type=int, help="default: the last one of the stage")
    parser.add_argument("--head", type=int, help="default: the mean of all heads")
    parser.add_argument("--channel", type=int, help="default: the mean of the channels")
    parser.add_argument(
        "--max-size",
        type=int,
        default=1024,
        metavar="N",
        help="larger images are shrunk to N pixels on their longer side (default: %(default)s)",
    )
    parser.add_argument("--out", required=True, metavar="PNG", help="picture to write")
    parser.set_defaults(run=_filters, packages=("PIL", "matplotlib"))


def _pixel(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"a pixel is X,Y, two whole numbers, got {text}")
    return int(match[1]), int(match[2])


def _parts(options: argparse.Namespace) -> int:
    from ..archs import read_arch
    from .counting import bare_backbone, from_config
    from .parts import count_parts, record, table

    _check_one(options.config, options.arch, "CONFIG")
    if options.json:
        keep_inputs("--json", options.json, [options.config])
    if options.size and min(options.size) < 1:
        raise UsageError(f"--size must be positive, got {options.size[0]} {options.size[1]}")
    if options.arch:
        subject = bare_backbone(read_arch(options.arch))
    else:
        subject = from_config(options.config)
    size = tuple(options.size or subject.size)
    parts = count_parts(subject, size)
    show(table(subject, parts, size))
    if options.json:
        content = json.dumps(record(subject, parts, size), indent=1) + "\n"
        _write(options.json, content.encode())
    return 0


def _filters(options: argparse.Namespace) -> int:
    from ..archs import read_arch
    from .attention import default_pixels, look, read_photo, trained_backbone, untrained_backbone
    from .picture import draw, to_png

    _check_one(options.checkpoint, options.arch, "CHECKPOINT")
    if not options.out.endswith(".png"):
        raise UsageError(f"--out must name a .png file, got {options.out}")
    keep_inputs("--out", options.out, [options.image, options.checkpoint])
    if options.max_size < 1:
        raise UsageError(f"--max-size must be positive, got {options.max_size}")
    photo, scale = read_photo(options.image, options.max_size)
    if options.arch:
        backbone, name = untrained_backbone(read_arch(options.arch))
    else:
        backbone, name = trained_backbone(options.checkpoint)
    pixels = [(int(x * scale), int(y * scale)) for x, y in options.pixel or []]
    where = options.stage, options.block, options.head, options.channel
    view = look(backbone, name, photo, pixels or default_pixels(photo), *where)
    _write(options.out, to_png(draw(view)))
    shrunk = f", shrunk to {photo.shape[1]}x{photo.shape[0]}" if scale < 1 else ""
    show(f"{view.title}; {view.of}")
    show(f"wrote: {options.out} ({len(view.pixels)} pixels of {options.image}{shrunk})")
    return 0


def _check_one(file: str | None, arch: str | None, name: str) -> None:
    if bool(file) == bool(arch):
        raise UsageError(f"either {name} or --arch is needed, got {'both' if file else 'neither'}")


def _write(path: str, content: bytes) -> None:
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    with replacing(path) as file:
        file.write(content)
