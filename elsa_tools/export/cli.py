"""The command line of ``elsa export`` and tools/export_onnx.py."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from elsa_core.runtime.command_line import exit_status, keep_inputs, say, show
from elsa_core.runtime.errors import UsageError
from elsa_core.variants import VoloArch
from elsa_tools.archs import NAMES, Backbone, build_backbone, read_arch
from elsa_tools.arguments import add_config_settings, command_parser

if TYPE_CHECKING:
    from elsa_tools.predict.inferencer import Inferencer

    from .models import Exportable
    from .record import Record

DETAILS = """\
The ending of OUT says the format: .onnx (ONNX, opset 20), .pt2 (torch.export) or .xml (OpenVINO,
with a .bin file). What is exported:
  --config of a detector   Faster, Mask or Cascade R-CNN: image [B, 3, H, W] and size [B, 2] ->
                           boxes, scores, labels, images and, with a mask head, masks of the N
                           detections
  --config of a segmentor  UPerNet: image -> logits [B, K, H, W]
  --part backbone          its backbone: image -> a map of each stage, res2 ... res5
  --arch                   a bare backbone: image, normalised -> res2 ... res5; of ELSA-VOLO without
                           --pyramid stage1 ... stage4, at strides 8, 16, 16, 16

B, H and W may be anything in each run; images are RGB with values in 0..255. OUT is written only
where every executor that is installed for it computes what the framework does: the same objects,
boxes within 0.05 pixels, scores within 0.001, mask IoU from 0.99, 99.99 % of the pixels, maps
within 1e-4. OUT.report.json has the comparison. 'elsa demo --model OUT' runs the file.

exit status: 0 done, 2 an error (one sentence on standard error; OUT is as it was), 130 interrupted
"""
PACKAGES = ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "tqdm")
BAR = "{desc} |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}]"
FORMATS = {".onnx": "onnx", ".pt2": "torch", ".xml": "openvino"}


def main(arguments: Sequence[str] | None = None, prog: str = "export_onnx.py") -> int:
    options = parse_arguments(arguments, prog)
    kept = f"interrupted, {options.out} is as it was before"
    tool = prog.removesuffix(".py")
    return exit_status(tool, lambda: run(options, tool), kept, PACKAGES)


def parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(prog, "Export a model to ONNX, PyTorch or OpenVINO.", DETAILS)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="Detectron2 .yaml or OpenMMLab .py, or configs/...")
    what.add_argument(
        "--arch", help=f"a bare backbone: {', '.join(NAMES)}, or a dict as in a config"
    )
    parser.add_argument(
        "--pyramid", action="store_true", help="of --arch ELSA-VOLO: maps at strides 4, 8, 16, 32"
    )
    parser.add_argument(
        "--img-size",
        type=int,
        metavar="N",
        help="of --arch ELSA-VOLO: side that the position embedding is made for (default: 224)",
    )
    parser.add_argument("--weights", metavar="CHECKPOINT", help="default: random weights")
    parser.add_argument("--out", required=True, help="the .onnx, .pt2 or .xml file to write")
    parser.add_argument(
        "--to", choices=list(FORMATS.values()), help="the format, default: by the ending of OUT"
    )
    parser.add_argument(
        "--part", choices=["model", "backbone"], default="model", help="default: the whole model"
    )
    parser.add_argument(
        "--half", action="store_true", help="round the weights to float16 and store them so"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="of a .pt2 file: machine code by AOTInductor, for this kind of processor",
    )
    parser.add_argument(
        "--int8",
        metavar="FOLDER",
        help="quantise to int8, calibrated on images; parts that lose accuracy stay float32",
    )
    parser.add_argument(
        "--paste", action="store_true", help="masks as pixels of the image instead of logits"
    )
    parser.add_argument(
        "--normalised", action="store_true", help="the file's input is normalised already"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the file with the framework before it is written (default)",
    )
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="IMAGE", help="to compare on; default: a drawing"
    )
    add_config_settings(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, tool: str) -> int:
    check_options(options)
    from tqdm import tqdm

    with tqdm(desc="loading the model", bar_format=BAR, disable=None, leave=False) as bar:
        module, record, inferencer = load(options, tool)
        from .write import report_path, write_model

        if not options.weights:
            bar.clear()
            say(tool, "without --weights the weights are random")
        checks, quantised = write_model(
            module,
            record,
            options.out,
            inferencer=inferencer,
            images=options.images,
            verified=options.verify,
            calibration=options.int8,
            compiled=options.compile,
            bar=bar,
        )
    for line in (*checks, *([quantised] if quantised else [])):
        show(str(line))
    if module.task == "detection" and checks and not sum(c.numbers["detections"] for c in checks):
        say(tool, "nothing was detected in any image: --images with objects compares more")
    size = sum(os.path.getsize(file) for file in files(options.out)) / 1e6
    show(f"wrote: {options.out} ({size:.1f} MB) and {report_path(options.out)}")
    return 0


def files(path: str) -> list[str]:
    """Those of a model: OpenVINO's are two."""
    stem, ending = os.path.splitext(path)
    return [path, f"{stem}.bin"] if ending == ".xml" else [path]


def check_options(options: argparse.Namespace) -> None:
    """Raises UsageError for what cannot work, before anything is loaded."""
    ending = os.path.splitext(options.out)[1]
    if ending not in FORMATS:
        raise UsageError(f"--out must end in {', '.join(FORMATS)}, got {options.out}")
    if options.to not in (None, FORMATS[ending]):
        wanted = next(key for key, value in FORMATS.items() if value == options.to)
        raise UsageError(f"--out must end in {wanted} for --to {options.to}, got {options.out}")
    read = [options.weights, options.config, *options.images]
    for file in files(options.out):
        keep_inputs("--out", file, read)
    if options.arch and (options.options or options.part != "model" or options.normalised):
        raise UsageError("--opts, --part and --normalised belong to --config")
    if options.config and (options.pyramid or options.img_size is not None):
        raise UsageError("--pyramid and --img-size belong to --arch")
    if options.img_size is not None and options.img_size < 1:
        raise UsageError(f"--img-size must be positive, got {options.img_size}")
    if options.int8 is not None and not os.path.isdir(options.int8):
        raise UsageError(f"--int8 must name a folder of images, got {options.int8}")
    if options.int8 is not None and (options.half or options.arch):
        raise UsageError("--int8 goes with --config and without --half")
    if ending == ".pt2" and (options.half or options.int8 is not None):
        raise UsageError("--half and --int8 are for .onnx and .xml files")
    if options.compile and ending != ".pt2":
        raise UsageError(f"--compile is for .pt2 files, got {options.out}")
    if os.path.isdir(options.out):
        raise UsageError(f"--out must be a file, {options.out} is a folder")
    folder = os.path.dirname(options.out) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"the folder {folder} of --out does not exist")
    if missing := [image for image in options.images if not os.path.isfile(image)]:
        raise UsageError(f"--images {missing[0]} does not exist")
    if options.images or options.int8 is not None:
        from elsa_tools.predict.inputs import find_inputs, is_video, read_image

        for image in options.images:
            read_image(image)
        if options.int8 is not None and all(map(is_video, find_inputs([options.int8]))):
            raise UsageError(f"--int8 must name a folder of images, {options.int8} has none")


def _bare_backbone(options: argparse.Namespace) -> Backbone:
    arch = read_arch(options.arch)
    if isinstance(arch, VoloArch):
        return build_backbone(arch, pyramid=options.pyramid, img_size=options.img_size or 224)
    if options.pyramid or options.img_size:
        raise UsageError("--pyramid and --img-size belong to --arch of an ELSA-VOLO")
    return build_backbone(arch)


def _load_weights(backbone: Backbone, path: str, tool: str) -> None:
    """Load a checkpoint, and say what it does not have; UsageError without ELSA's attention."""
    from elsa_core.weights import load_backbone

    conversion = load_backbone(backbone, path)
    absent = [name for name, _ in conversion.absent]
    if any(".attn." in name for name in absent):
        raise UsageError(f"{path} holds {conversion.source}, which has no ELSA attention to export")
    if absent:
        say(tool, f"not in {path}, left as initialised: {', '.join(absent)}")


def load(options: argparse.Namespace, tool: str) -> tuple[Exportable, Record, Inferencer | None]:
    """The model to export, its record, and what to compare it with."""
    from .build import wrap
    from .models import Backbone as Exported
    from .models import round_weights
    from .record import Record, record_of

    inferencer = None
    if options.arch:
        backbone = _bare_backbone(options)
        if options.weights:
            _load_weights(backbone, options.weights, tool)
        module: Exportable = Exported(backbone, None).eval()
        if options.half:
            round_weights(module)
        record = Record(task="features", normalised=True)
    else:
        from elsa_tools.predict.load import load_inferencer

        inferencer = load_inferencer(
            options.config, options.weights, device="cpu", options=options.options
        )
        if options.half:
            round_weights(inferencer.model)
        module = wrap(inferencer, options.part, options.normalised, options.paste)
        record = record_of(inferencer, module.task)
        record = dataclasses.replace(record, normalised=options.normalised)
    if options.paste:
        if module.task != "detection":
            raise UsageError(f"--paste belongs to detectors, got a model for {module.task}")
        record = dataclasses.replace(record, masks="pasted")
    if options.half:
        record = dataclasses.replace(record, precision="float16")
    return module, record, inferencer


if __name__ == "__main__":
    sys.exit(main())
