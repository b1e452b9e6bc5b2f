"""Runs a script of Detectron2's with our config keys: ``python -m elsa_d2 SCRIPT ARGS...``."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from elsa_core.runtime.errors import UsageError

from .script import SCRIPT

DETAILS = """\
For train_net.py, analyze_model.py, visualize_data.py or demo.py of a clone of Detectron2, and for
scripts of your own. They begin with Detectron2's default config, in which our keys are then; the
data sets that --config-file lists (DATASETS.REGISTER_COCO and the like) are registered.

exit status: that of the script, or 2 for an error (one sentence on standard error)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m elsa_d2",
        description="Runs a script of Detectron2's with ELSA-Swin and its config keys.",
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if not os.path.isfile(options.script):
        parser.error(f"the script {options.script} does not exist")
    sys.argv = [options.script, *options.arguments]
    os.environ[SCRIPT] = os.path.abspath(options.script)
    sys.path[0] = os.path.dirname(os.environ[SCRIPT])  # as `python SCRIPT` does
    try:
        runpy.run_module(f"{__package__}.script", run_name="__main__", alter_sys=True)
    except UsageError as error:
        print(f"elsa_d2: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
