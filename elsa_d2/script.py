"""The main module of ``python -m elsa_d2 SCRIPT`` and of the processes that the script starts.

These processes import this module by name instead of the script by file, and so get our keys, too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from detectron2.config import defaults

from . import (
    add_elsa_swin_config,
    load_config,
    register_cityscapes_datasets,
    register_coco_datasets,
    register_sem_seg_datasets,
)

SCRIPT = "ELSA_D2_SCRIPT"  # the environment variable that names the script's file


def add_to_defaults() -> None:
    """Adds our keys to the config that `detectron2.config.get_cfg` copies, in this process."""
    if "ELSA_SWIN" not in defaults._C.MODEL:
        add_elsa_swin_config(defaults._C)


def register_datasets(arguments: Sequence[str]) -> None:
    """Registers the data sets of --config-file FILE.yaml and DATASETS.* in a script's arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-file", default="")
    options, rest = parser.parse_known_args(arguments)
    if not options.config_file.endswith((".yaml", ".yml")):
        return
    pairs = [pair for pair in zip(rest, rest[1:], strict=False) if pair[0].startswith("DATASETS.")]
    cfg = load_config(options.config_file, [part for pair in pairs for part in pair])
    register_coco_datasets(cfg)
    register_sem_seg_datasets(cfg)
    register_cityscapes_datasets(cfg)


if __name__ in ("__main__", "__mp_main__"):
    add_to_defaults()
    register_datasets(sys.argv[1:])
    sys.argv[0] = __file__ = os.environ[SCRIPT]
    with open(__file__, "rb") as source:
        exec(compile(source.read(), __file__, "exec", dont_inherit=True))
