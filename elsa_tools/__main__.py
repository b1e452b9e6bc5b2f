"""The command ``elsa``, also ``python -m elsa_tools``: the project's commands under one name.

Outside elsa_core, whose import fails where PyTorch is missing or too old: here that is a sentence.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .arguments import command_parser


class Command(NamedTuple):
    """A module with ``main(arguments, prog)``, and the packages that importing it needs."""

    module: str
    summary: str
    packages: tuple[str, ...] = ()


COMMANDS = {
    "doctor": Command("elsa_core.doctor", "says what this installation has and whether it works"),
    "convert": Command("elsa_tools.convert", "converts checkpoints between the frameworks"),
    "demo": Command(
        "elsa_tools.predict.cli", "shows what a trained model finds in images", ("numpy",)
    ),
    "data": Command("elsa_tools.data.cli", "checks, links and derives data sets"),
    "export": Command(
        "elsa_tools.export.cli", "exports a model to ONNX, PyTorch or OpenVINO", ("numpy",)
    ),
    "analyze": Command("elsa_tools.inspect.cli", "shows a model's parts, attention and results"),
    "fit": Command("elsa_tools.fit.cli", "trains a model on a folder of annotated images"),
}
DETAILS = "\n".join(
    [
        "commands:",
        *(f"  {name:9}{command.summary}" for name, command in COMMANDS.items()),
        "\n'elsa COMMAND --help' says more. tools/train_net.py (Detectron2) and tools/train.py",
        "(OpenMMLab) train models, and so do the frameworks' own tools.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command ends with; 2, after one sentence, for an unknown one and without PyTorch."""
    try:
        from elsa_core import __version__
        from elsa_core.runtime.command_line import exit_status
    except ImportError as error:
        print(f"elsa: {error}", file=sys.stderr)
        return 2
    parser = command_parser(
        "elsa", "ELSA-Swin and ELSA-VOLO for Detectron2 and OpenMMLab.", DETAILS
    )
    parser.add_argument("--version", action="version", version=f"elsa-swin {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    name = options.command
    if name not in COMMANDS:
        print(f"elsa: {name!r} is none of the commands {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command, tool = COMMANDS[name], f"elsa {name}"

    def run() -> int:
        status: int = importlib.import_module(command.module).main(options.arguments, tool)
        return status

    return exit_status(tool, run, packages=command.packages)


if __name__ == "__main__":
    sys.exit(main())
