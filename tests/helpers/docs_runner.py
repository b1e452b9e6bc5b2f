"""Runs the pages of the docs, each in a process of its own that has the frameworks loaded already.

Takes a line ``{"page": FILE, "folder": FOLDER, "output": FILE}`` for each page and
answers with its exit status. Forks, so it must not compute anything itself.
"""

import gc
import importlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

PRELOADED = (
    "torch",
    "detectron2.engine",
    "elsa_d2",
    "mmdet.apis",
    "mmseg.apis",
    "mmpretrain.apis",
    "elsa_mm.cli",
)


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for name in PRELOADED:
        importlib.import_module(name)
    from docs_blocks import read_page, run_page
    from quick_mmengine import quicken_mmengine

    quicken_mmengine()
    gc.freeze()  # MMEngine collects garbage for each data set: not among all that is loaded already
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with open(job["output"], "wb") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                run_page(read_page(Path(job["page"])), Path(job["folder"]))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended), file=answers, flush=True)


if __name__ == "__main__":
    main()
