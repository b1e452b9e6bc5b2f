"""Finds and loads the compiled operator."""

import sys
import warnings
from pathlib import Path

import torch


def binaries() -> list[Path]:
    """The compiled extension beside this file; empty where it was not built.

    In the folder of a clone, Python imports the clone and not what was installed from it: where
    this copy has no binary, that of another copy of the same version on ``sys.path`` is taken.
    """
    here = Path(__file__).parent
    version = (here / "__init__.py").read_bytes()
    for folder in [here, *(Path(place, here.name).resolve() for place in sys.path)]:
        found = sorted(folder.glob("_C*.so"))
        if found and (folder / "__init__.py").read_bytes() == version:
            return found
    return []


def load_extension() -> bool:
    """Loads ``elsa_core/_C`` into the dispatcher; False, with one warning, where it was not built.

    Raises:
        ImportError: the file is there but does not load, as after a change of the PyTorch version.
    """
    found = binaries()
    if not found:
        warnings.warn(
            "elsa_core runs without its compiled operator (slower): it was installed without a C++ "
            "compiler; install one and run 'pip install --no-build-isolation .' again",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        raise ImportError(
            f"{found[0]} does not load with PyTorch {torch.__version__}: build it again with "
            f"'pip install --no-build-isolation .' ({error})"
        ) from error
    return True
