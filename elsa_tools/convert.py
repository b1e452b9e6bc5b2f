"""The command line of tools/convert_weights.py."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from elsa_core.runtime.command_line import exit_status, keep_inputs, show
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing
from elsa_core.weights import report
from elsa_core.weights.convert import TARGETS
from elsa_core.weights.files import convert_file

from .arguments import command_parser

DETAILS = """\
SRC may be an original checkpoint (classification, detection, segmentation), one of Detectron2,
MMDetection, MMSegmentation or MMPretrain with an ELSA-Swin or ELSA-VOLO, a bare backbone, or an
ImageNet checkpoint of stock Swin (for --to backbone) or VOLO (for --to backbone, mmpretrain). What
it is, and the architecture, is read from its tensors. SRC: .pth, .safetensors or Detectron2's .pkl;
DST: .pth or .safetensors. ELSA-VOLO is a reconstruction: no official code or weights exist.

targets:
  backbone    initialises a backbone: MODEL.WEIGHTS, or init_cfg=dict(type='Pretrained', ...)
  detectron2  MODEL.WEIGHTS of Mask R-CNN, Cascade Mask R-CNN, UPerNet
  mmdet       load_from, or the checkpoint of tools/test.py: Mask R-CNN, Cascade Mask R-CNN
  mmseg       the same for UPerNet
  mmpretrain  ImageClassifier with out_indices=(last,), GlobalAveragePooling and LinearClsHead;
              of ELSA-VOLO, with ELSAVoloTokens and VoloHead
  original    the names and the container of the original release; of ELSA-VOLO, which has none,
              the names of VOLO's classifier

exit status: 0 done, 1 --verify found a difference that matters, 2 an error (one sentence on
standard error; DST is as it was before, unless --verify alone failed after "wrote:"), 130
interrupted
"""


def main(arguments: Sequence[str] | None = None, prog: str = "convert_weights.py") -> int:
    options = parse_arguments(arguments, prog)
    kept = f"interrupted, {options.destination} is as it was before"
    return exit_status(prog.removesuffix(".py"), lambda: _run_in_memory(options), kept)


def _run_in_memory(options: argparse.Namespace) -> int:
    try:
        return run(options)
    except MemoryError:
        raise UsageError(f"{options.source} does not fit into memory") from None


def parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    what = "Convert weights between the original release, Detectron2 and OpenMMLab."
    parser = command_parser(prog, what, DETAILS)
    parser.add_argument("source", metavar="SRC", help="checkpoint to read")
    parser.add_argument("destination", metavar="DST", help="file to write, never SRC itself")
    parser.add_argument("--to", required=True, choices=list(TARGETS), help="what DST is for")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take or leave averaged weights; default: take them for the base variant, whose "
        "published weights they are, and where they are the checkpoint's own state_dict",
    )
    parser.add_argument(
        "--keep-training-state",
        action="store_true",
        help="keep optimizer, iteration and the like, within one framework",
    )
    parser.add_argument(
        "--anchor-sizes",
        type=int,
        metavar="N",
        help="anchor sizes per pyramid level of a detector that has other than 3 anchors at a "
        "position, because the frameworks order them differently",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="execute the code that SRC asks for; a pickle can do anything that you can do",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run one image through Detectron2 and OpenMMLab and print the largest differences",
    )
    parser.add_argument("--image", help="image for --verify; default: a drawn one")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="config for --verify, .yaml for Detectron2 and .py for OpenMMLab; default: ours of "
        "the same method, with the sizes of SRC",
    )
    parser.add_argument("--report", metavar="FILE", help="write the fate of each tensor as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="name every tensor")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    if (options.image or options.config) and not options.verify:
        raise UsageError("--image and --config belong to --verify")
    for name in (options.source, options.destination):
        # DST may not be there yet.
        if options.report and os.path.realpath(options.report) == os.path.realpath(name):
            raise UsageError(f"--report {options.report} would overwrite {name}")
    folder = os.path.dirname(options.report or "") or "."
    if not os.path.isdir(folder):
        raise UsageError(f"--report {options.report}: the folder {folder} does not exist")
    keep_inputs("--report", options.report or "", [options.source, options.destination])
    conversion = convert_file(
        options.source,
        options.destination,
        options.to,
        ema=options.ema,
        trust=options.trust_pickle,
        keep_training_state=options.keep_training_state,
        anchor_sizes=options.anchor_sizes,
    )
    show(report.text(conversion, verbose=options.verbose))
    show(f"wrote: {options.destination} ({os.path.getsize(options.destination) / 1e6:.1f} MB)")
    if options.report:
        with replacing(options.report) as file:
            file.write(json.dumps(report.record(conversion), indent=1).encode() + b"\n")
    if not options.verify:
        return 0
    from .verify import verify

    differences = verify(conversion, options.destination, options.image, options.config)
    show(str(differences))
    return 0 if differences.same else 1
