"""Optional packages: import them, or name all that are missing in one message."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from types import ModuleType

from .errors import UsageError, one_line

# Module -> pip package. Frameworks are not listed: their guides have the commands.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cityscapesscripts": "cityscapesscripts",
    "cv2": "opencv-python-headless",  # the builds of OpenCV with windows need libGL
    "ftfy": "ftfy",  # MMSegmentation imports ftfy and regex but does not require them
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "mlflow": "mlflow",
    "nncf": "nncf",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "openvino": "openvino",
    "psutil": "psutil",
    "pycocotools": "pycocotools",
    "regex": "regex",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "supervision": "supervision",
    "tabulate": "tabulate",
    "tensorboard": "tensorboard",
    "tifffile": "tifffile",
    "tqdm": "tqdm",
    "wandb": "wandb",
    "yaml": "pyyaml",
}


def need(module: str, purpose: str) -> ModuleType:
    """Import a module. Raise UsageError, with the package to install, if that fails."""
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
    """Return a sentence that names the missing ``modules`` and those of ``others`` that are."""
    names = list(dict.fromkeys([*map(str, modules), *filter(is_missing, others)]))
    what = "package {} is" if len(names) == 1 else "packages {} are"
    sentence = f"the Python {what.format(', '.join(names))} missing in {sys.executable}"
    return sentence + _command(names)


def is_missing(module: str) -> bool:
    """Whether a module cannot be found. For "package.module", this imports the package."""
    try:
        return find_spec(module) is None
    except ImportError:
        return True


def _command(modules: Iterable[str]) -> str:
    known = [DISTRIBUTIONS[name] for name in modules if name in DISTRIBUTIONS]
    return f": pip install {' '.join(known)}" if known else ""
