"""Which kernels compute ``elsa::attention`` on a device, and the choice of others by name.

On a GPU the first of these that is there: the compiled CUDA kernels, Triton, plain PyTorch; on the
CPU the compiled kernels or plain PyTorch. All are kernels of the same operator: autograd, autocast,
torch.compile and export do not depend on the choice.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _fallback

NAMES = ("cuda", "triton", "torch")
VARIABLE = "ELSA_BACKEND"
GPUS = ("cuda", "xpu")
"""Types of devices that Triton serves. PyTorch for ROCm calls its own "cuda", too."""
_OPERATORS = ("attention", "attention_backward")
_KERNELS = "elsa_core.triton.operator"
_chosen: str | None = None
_library = torch.library.Library("elsa", "FRAGMENT")
_lock = threading.Lock()
_tried: dict[tuple[torch.device, torch.dtype], ModuleType | str] = {}


@functools.cache
def has_kernels(device_type: str) -> bool:
    """Return whether the extension has kernels for "cpu" or "cuda"."""
    marks = {"cpu": "cpu_capability", "cuda": "cuda_architectures"}
    return device_type in marks and hasattr(torch.ops.elsa, marks[device_type])


def backends_of(device: torch.device | str) -> list[str]:
    """Return the back ends that can be used on a device, in the order of choice.

    "cpu" and "cuda" are the compiled kernels, "triton" is Triton, "torch" is plain PyTorch.
    """
    device = torch.device(device)
    found = [device.type] if has_kernels(device.type) else []
    if _triton_serves(device.type) and not isinstance(_triton_kernels(device), str):
        found.append("triton")
    return [*found, "torch"]


def backend_of(device: torch.device | str) -> str:
    """Return the back end that computes on a device now; see `backends_of`."""
    device = torch.device(device)
    found = backends_of(device)
    if _chosen in found:
        return _chosen
    if device.type == "cpu" and "triton" in found:  # Triton's interpreter, only by name
        found.remove("triton")
    return found[0]


def use_backend(name: str | None) -> AbstractContextManager[object]:
    """Choose the kernels of the operator by name, in all threads, from now on.

    As a context manager, it restores the former choice at the end, in all threads, too:

    >>> with elsa_core.use_backend("torch"):
    ...     out = model(image)

    The environment variable ``ELSA_BACKEND`` takes the same names.

    Args:
        name: "cuda" for the compiled CUDA kernels, "triton" for Triton on GPUs (on the CPU only in
            its interpreter, with ``TRITON_INTERPRET=1``), "torch" for plain PyTorch on all devices,
            None for the default. Devices for which a back end has no kernels keep their own.

    Raises:
        ValueError: another name.
        RuntimeError: the extension has no CUDA kernels, or Triton is not installed.
    """
    restore = ExitStack()
    restore.callback(_choose, _chosen, "use_backend")
    _choose(name, "use_backend")
    return restore


def choose_from_environment() -> None:
    """Use the back end that ``ELSA_BACKEND`` names, or the default.

    Raises:
        ImportError: the name is wrong, or there is no such back end.
    """
    try:
        _choose(os.environ.get(VARIABLE) or None, VARIABLE)
    except (ValueError, RuntimeError) as error:
        raise ImportError(str(error)) from error


def _choose(name: str | None, asked_by: str) -> None:
    global _chosen
    if name not in (None, *NAMES):
        raise ValueError(f"{asked_by} must be cuda, triton or torch, got {name!r}")
    if name == "cuda" and not has_kernels("cuda"):
        raise RuntimeError(
            f"{asked_by} asks for cuda, but the extension has no CUDA kernels: build it where "
            "there is nvcc, or choose triton or torch"
        )
    if name == "triton" and not find_spec("triton"):
        raise RuntimeError(
            f"{asked_by} asks for triton, which is not installed: choose cuda or torch"
        )
    with _lock:
        _chosen = name
        for device_type in ("cpu", *GPUS):
            by_triton = name == "triton" or not has_kernels(device_type)
            if name == "torch" or (by_triton and _triton_serves(device_type)):
                _register(device_type)


@functools.cache
def _register(device_type: str) -> None:
    """Register kernels that follow the choice, for good: other threads may be in one."""
    key = device_type.upper()
    for operator in _OPERATORS:
        own = None
        if has_kernels(device_type):
            own = torch.library.get_kernel(f"elsa::{operator}", key)
        with warnings.catch_warnings():  # PyTorch 2.10 and 2.11 warn of a second kernel
            warnings.simplefilter("ignore")
            _library.impl(operator, _follow(operator, own), key, with_keyset=True)


def _follow(operator: str, own: Any) -> Callable[..., object]:
    """Return a kernel that calls the chosen one; ``own`` is the compiled one or None."""

    def kernel(keyset: Any, first: Tensor, *others: object) -> object:
        kernels = _kernels_in_python(first.device, first.dtype)
        if kernels is None and own is not None:
            return own.call_boxed(keyset, first, *others)
        return getattr(kernels or _fallback, operator)(first, *others)

    return kernel


def _kernels_in_python(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Return the module of the chosen kernels; None for those that a device has by default."""
    if _chosen == "torch":
        return _fallback
    by_default = device.type in GPUS and not has_kernels(device.type)
    if not _triton_serves(device.type) or not (_chosen == "triton" or by_default):
        return None
    kernels = _triton_kernels(device, dtype)
    if not isinstance(kernels, str):
        return kernels
    reason = f"Triton does not work on {device} with {dtype} ({kernels})"
    if _chosen == "triton":
        raise RuntimeError(f"elsa_attention: {reason}, and triton was chosen by name")
    _warn_once(f"elsa_core computes in plain PyTorch (slower): {reason}")
    return None


def _triton_serves(device_type: str) -> bool:
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return device_type in GPUS or interpreted


def _triton_kernels(device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType | str:
    """Return the module of the kernels, or why they do not run on the device."""
    key = device, dtype
    if key not in _tried:
        if device.type == "cuda" and torch.cuda.is_initialized():
            if torch.cuda.is_current_stream_capturing():  # a trial would be a part of the graph
                return _try_triton(device, dtype, launch=False)
        _tried[key] = _try_triton(device, dtype)
    return _tried[key]


def _try_triton(device: torch.device, dtype: torch.dtype, launch: bool = True) -> ModuleType | str:
    try:
        kernels = import_module(_KERNELS)
        if launch:
            small = torch.zeros(1, 1, 1, 1, device=device, dtype=dtype)
            problem = small, small, small[0], None, 1, 1
            kernels.attention(*problem)
            kernels.attention_backward(small, *problem)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton, its compilers and the drivers raise what they like
        return str(error).strip().rpartition("\n")[-1] or type(error).__name__
    return kernels


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
