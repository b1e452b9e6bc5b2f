"""Read and write safetensors files with the library of that name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO

from torch import Tensor

from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.runtime.packages import need

# Bytes; enough for 80,000 tensors. JSON takes twenty times its size in memory.
MAX_HEADER = 8 * 10**6


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file is a safetensors file: ``head`` is its first 9 bytes, ``size`` its size."""
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def load(file: IO[bytes], path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata.

    Args:
        file: safetensors file at its beginning.
        path: name of the file in messages.

    Raises:
        UsageError: the file is damaged or the library is missing.
    """
    library = need("safetensors.torch", f"reading {path}")
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER:
        raise _damaged(path, f"its header claims {length} bytes, at most {MAX_HEADER} are read")
    header = file.read(length)
    try:
        tensors = library.load(head + header + file.read())
    except Exception as error:  # of the library, or of PyTorch for a wrong shape
        raise _damaged(path, one_line(error)) from error
    return tensors, json.loads(header).get("__metadata__") or {}


def save(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors.

    Raises:
        UsageError: the format lacks an element type, or the library is missing.
    """
    library = need("safetensors.torch", "writing a safetensors file")
    places: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():  # the library refuses tensors that share memory
        own[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    try:
        data = memoryview(library.save(own, dict(metadata)))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"a tensor cannot be stored in safetensors: {one_line(error)}") from error
    # The library writes the metadata in any order. Sort it, so that the same tensors give the same
    # bytes.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(bytes(data[8:start])), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    file.write(data[start:])


def _damaged(path: str, why: str) -> UsageError:
    return UsageError(f"{path} is a damaged safetensors file: {why[:300]}")
