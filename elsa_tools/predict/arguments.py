"""What the command lines of this package share."""

from __future__ import annotations

import argparse


def add_config_settings(parser: argparse.ArgumentParser) -> None:
    """--opts, which becomes the list ``options``."""
    parser.add_argument(
        "--opts",
        "--cfg-options",
        nargs="+",
        default=[],
        dest="options",
        metavar="OPTION",
        help="config settings: KEY VALUE ... for Detectron2, KEY=VALUE ... for OpenMMLab",
    )
