"""Find and load the compiled operator."""

import platform
import sys
import warnings
from pathlib import Path

import torch

from ._range import TORCH_WITH_EXTENSION, dotted, numbers

INSTALL = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps ."


def binaries() -> list[Path]:
    """Return the compiled extension beside this file, or an empty list if it was not built.

    In the folder of a clone, Python imports the clone and not the installed package. If this copy
    has no binary, that of another copy of the same version on ``sys.path`` is used.
    """
    here = Path(__file__).parent
    version = (here / "__init__.py").read_bytes()
    for folder in [here, *(Path(place, here.name).resolve() for place in sys.path)]:
        found = sorted(folder.glob("_C*.so"))
        if found and (folder / "__init__.py").read_bytes() == version:
            return found
    return []


def load_extension() -> bool:
    """Load ``elsa_core/_C`` into the dispatcher. Return False, with one warning, without one.

    Raises:
        ImportError: the file exists but does not load, for instance on another platform.
    """
    if numbers(torch.__version__) < TORCH_WITH_EXTENSION:
        _warn(
            f"it needs PyTorch {dotted(TORCH_WITH_EXTENSION)} or later, and this is PyTorch "
            f"{torch.__version__}"
        )
        return False
    found = binaries()
    if not found:
        _warn(
            "it was installed without it; install a wheel that has it, or a C++ compiler and then "
            f"again by '{INSTALL}'"
        )
        return False
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        raise ImportError(
            f"{found[0]} does not load on this {platform.system()} {platform.machine()} with "
            f"PyTorch {torch.__version__}: delete it to do without, or build it again by "
            f"'{INSTALL}' ({error})"
        ) from error
    return True


def _warn(reason: str) -> None:
    warnings.warn(
        f"elsa_core runs without its compiled operator (slower): {reason}",
        RuntimeWarning,
        stacklevel=4,
    )
