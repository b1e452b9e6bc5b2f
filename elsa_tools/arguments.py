"""Arguments that the command lines of this package share."""

from __future__ import annotations

import argparse


def command_parser(prog: str, description: str, details: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with ``details``, in their own lines."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config_settings(parser: argparse.ArgumentParser) -> None:
    """Add --opts, which becomes the list ``options``."""
    parser.add_argument(
        "--opts",
        "--cfg-options",
        nargs="+",
        default=[],
        dest="options",
        metavar="OPTION",
        help="config settings: KEY VALUE ... for Detectron2, KEY=VALUE ... for OpenMMLab",
    )
