"""Packages that only some commands need: one sentence about all that are missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from types import ModuleType

from .errors import UsageError, one_line

# What pip installs for a module. Frameworks are left out: their guides have their commands.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cityscapesscripts": "cityscapesscripts",
    "cv2": "opencv-python-headless",  # the builds of OpenCV with windows need libGL
    "ftfy": "ftfy",  # MMSegmentation imports it and does not bring it, nor regex
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "pycocotools": "pycocotools",
    "regex": "regex",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "tabulate": "tabulate",
    "tqdm": "tqdm",
}


def need(module: str, purpose: str) -> ModuleType:
    """The module. Raises UsageError where it cannot be imported, which says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError)
        package = ((absent and error.name) or module).partition(".")[0]
        fault = f"is missing in {sys.executable}" if absent else f"fails with {one_line(error)!r}"
        raise UsageError(
            f"{purpose} needs the Python package {package}, which {fault}{_command([package])}"
        ) from error


def missing(modules: Iterable[str | None], others: Iterable[str] = ()) -> str:
    """A sentence that names modules that are missing, and those of others that are, too."""
    names = list(dict.fromkeys([*map(str, modules), *filter(is_missing, others)]))
    what = "package {} is" if len(names) == 1 else "packages {} are"
    sentence = f"the Python {what.format(', '.join(names))} missing in {sys.executable}"
    return sentence + _command(names)


def is_missing(module: str) -> bool:
    """Whether a module cannot be found; of "package.module", the package is imported."""
    try:
        return find_spec(module) is None
    except ImportError:
        return True


def _command(modules: Iterable[str]) -> str:
    known = [DISTRIBUTIONS[name] for name in modules if name in DISTRIBUTIONS]
    return f": pip install {' '.join(known)}" if known else ""
