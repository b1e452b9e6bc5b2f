"""The ends of `make setup`: whether this machine can carry it, and whether the result works.

The steps between them are in the Makefile.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 10), (3, 13)
DISK_GB = 9


class SetupError(Exception):
    """What is wrong and what to do, in one sentence."""


def check_python(version: Sequence[int], executable: str) -> None:
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        found = ".".join(str(part) for part in version[:2])
        raise SetupError(
            f"Python 3.10 to 3.13 is needed, {executable} is {found}; "
            "name another one with make PYTHON=..."
        )


def check_machine() -> None:
    python = "python{}.{}".format(*sys.version_info)
    if (machine := (sys.platform, platform.machine())) != ("linux", "x86_64"):
        raise SetupError(f"the set-up is for Linux on x86_64, this is {' on '.join(machine)}")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments: "
            f"install {python}-venv (apt install {python}-venv)"
        ) from None
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(shlex.split(name)[0]) for name in names):
        raise SetupError(
            f"no C++ compiler found ({', '.join(names)}), and mmcv has to be compiled: "
            "install g++ (apt install g++)"
        )
    if not (header := Path(sysconfig.get_paths()["include"], "Python.h")).is_file():
        raise SetupError(
            f"{header} is missing, and mmcv has to be compiled: "
            f"install {python}-dev (apt install {python}-dev)"
        )
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK_GB:
        raise SetupError(f"{ROOT} needs {DISK_GB} GB of disk space, {free:.1f} are free")


def watch(log: str, total: int) -> None:
    """Shows how many of ``total`` packages pip has, from what it says, which goes to a file."""
    starts = ("Collecting ", "Ignoring ", "Obtaining ", "Processing ", "Requirement already ")
    done, end = 0, "\r" if sys.stdout.isatty() else "\n"
    with open(log, "w") as file:
        for line in sys.stdin:
            file.write(line)
            file.flush()
            counts = line.startswith(starts)
            done += counts
            if line.startswith("Installing ") or (counts and (end == "\r" or done % 50 == 0)):
                what = "installing" if line.startswith("Installing ") else "downloading"
                print(f"  {what}: {min(done, total)} of {total} packages   ", end=end, flush=True)
    print(end="\n" if end == "\r" and done else "")


def verify() -> None:
    """Imports every framework, and runs mmcv's and torchvision's compiled operators."""
    # Of an extension that does not load.
    warnings.filterwarnings("error", category=RuntimeWarning, message="elsa_core")
    from elsa_core.runtime.quiet import quiet_frameworks

    with quiet_frameworks():
        import torch
        import torchvision
        from detectron2 import model_zoo
        from detectron2.modeling.meta_arch import GeneralizedRCNN  # noqa: F401
        from mmcv.ops import nms
        from mmdet.datasets import CocoDataset  # noqa: F401
        from mmdet.models import MaskRCNN  # noqa: F401
        from mmpretrain.models import ImageClassifier  # noqa: F401
        from mmseg.models import EncoderDecoder  # noqa: F401

        model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9], [6.0, 6.0, 9.0, 9.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    kept = nms(boxes, scores, 0.5)[1].tolist(), torchvision.ops.nms(boxes, scores, 0.5).tolist()
    if kept != ([0, 2], [0, 2]):
        raise SetupError(f"NMS of mmcv and torchvision kept {kept}, not boxes 0 and 2")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verify", action="store_true", help="check what was made")
    parser.add_argument("--watch", metavar="LOG", help="show how far pip is, keep what it says")
    parser.add_argument("--total", type=int, default=1, help="packages that pip is to install")
    options = parser.parse_args(arguments)
    try:
        if options.verify:
            verify()
        elif options.watch:
            watch(options.watch, options.total)
        else:
            check_python(sys.version_info, sys.executable)
            check_machine()
    except SetupError as error:
        print(f"Set-up failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
