"""The command line of tools/export_onnx.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from elsa_core import VARIANTS, ELSASwin
from elsa_core.runtime.command_line import exit_status, keep_inputs, show
from elsa_core.runtime.errors import UsageError
from elsa_tools.arguments import add_config_settings, command_parser

DETAILS = """\
What is exported:
  --config of a UPerNet   the model: image [B, 3, H, W], RGB, 0..255 -> logits [B, K, H, W]
  --config of a detector, or --part backbone
                          the backbone: the same image -> a map of each stage, res2 ... res5
  --arch                  the bare backbone: image normalised -> res2 ... res5

B, H and W may be anything in each run. The file is compared with PyTorch over three sizes before
it is written: at most 1e-4, absolute for maps, relative to the largest logit for logits.

exit status: 0 done, 2 an error (one sentence on standard error; OUT is as it was), 130 interrupted
"""


PACKAGES = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")


def main(arguments: Sequence[str] | None = None, prog: str = "export_onnx.py") -> int:
    options = parse_arguments(arguments, prog)
    kept = f"interrupted, {options.out} is as it was before"
    return exit_status(prog.removesuffix(".py"), lambda: run(options), kept, PACKAGES)


def parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(prog, "Export ELSA-Swin, alone or in a UPerNet, to ONNX.", DETAILS)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="Detectron2 .yaml or OpenMMLab .py, or configs/...")
    what.add_argument("--arch", choices=list(VARIANTS), help="a bare backbone")
    parser.add_argument("--weights", metavar="CHECKPOINT", help="default: random weights")
    parser.add_argument("--out", required=True, help="the .onnx file to write")
    parser.add_argument(
        "--part",
        choices=["auto", "backbone", "model"],
        default="auto",
        help="of a config's model; auto: the model where it is a UPerNet, else the backbone",
    )
    add_config_settings(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    if not options.out.endswith(".onnx"):
        raise UsageError(f"--out must end in .onnx, got {options.out}")
    keep_inputs("--out", options.out, [options.weights, options.config])
    if options.arch and (options.options or options.part != "auto"):
        raise UsageError("--opts and --part belong to --config")
    folder = os.path.dirname(options.out) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"the folder {folder} of --out does not exist")
    from .onnx import TOLERANCE, Backbone, export, wrap
    from .record import Record, record_of

    if options.arch:
        backbone = ELSASwin(options.arch)
        if options.weights:
            from elsa_core.weights import load_backbone

            load_backbone(backbone, options.weights)
        module = Backbone(backbone, None)
        record = Record(task="features", normalised=True)
    else:
        from elsa_tools.predict.load import load_inferencer

        inferencer = load_inferencer(
            options.config, options.weights, device="cpu", options=options.options
        )
        module = wrap(inferencer, options.part)
        record = record_of(inferencer, None if "logits" in module.names else "features")
    if not options.weights:
        print("export_onnx: without --weights the weights are random", file=sys.stderr)
    if sys.stderr.isatty():
        print("exporting ...", file=sys.stderr)
    for difference in export(module, options.out, record=record):
        size = "x".join(map(str, difference.shape))
        print(f"{size}: onnxruntime and PyTorch differ by {difference.value:.1e}")
    show(
        f"wrote: {options.out} ({os.path.getsize(options.out) / 1e6:.1f} MB, at most {TOLERANCE:g})"
    )
    return 0
