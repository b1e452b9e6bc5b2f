"""Raise ImportError, before other imports, if Python or PyTorch is missing or not supported."""

import sys

from . import _range

if _problem := _range.python_obstacle(sys.version_info[:2]):
    raise ImportError(_problem)
try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    least = _range.dotted(_range.TORCH)
    raise ImportError(
        f"elsa-swin needs PyTorch {least} or later, and there is none: install torch first"
    ) from None
if _problem := _range.torch_obstacle(torch.__version__):
    raise ImportError(_problem)
