"""The safetensors format: a JSON header with names, types, shapes and offsets, then raw bytes.

Source: the format's description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor

from elsa_core.errors import UsageError, one_line

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 * 10**6


def load(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, which share one private memory map of the file, and the metadata.

    Raises UsageError for a file that is cut off or contradicts itself.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header, start = _read_header(file, size, str(path))
        if size == start:
            memory = None
        else:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    metadata = header.pop("__metadata__", {})
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item, path)):
        try:
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin, stop = entry["data_offsets"]
            count = math.prod(shape)
            whole = stop - begin == count * dtype.itemsize and all(n >= 0 for n in shape)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"tensor {name} is not described as it should be") from error
        if not whole or begin != end or start + stop > size:
            raise _damaged(path, f"tensor {name} claims bytes that the file does not have")
        end = stop
        if count:
            assert memory is not None
            tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=start + begin)
            tensors[name] = tensor.reshape(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    if start + end != size:
        raise _damaged(path, f"{size - start - end} bytes belong to no tensor")
    return {name: tensors[name] for name in header}, metadata


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes that begins with ``head`` (9 bytes) has this format."""
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def save(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes contiguous tensors. Raises UsageError for an element type that the format lacks."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise UsageError(f"safetensors has no elements of type {tensor.dtype} (tensor {name})")
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        if count := tensor.numel() * tensor.dtype.itemsize:
            file.write(memoryview((ctypes.c_char * count).from_address(tensor.data_ptr())))


def _read_header(file: IO[bytes], size: int, path: str) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER):
        raise _damaged(path, f"the header claims {length} bytes")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, one_line(error)) from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is no JSON object")
    return header, 8 + length


def _begin(item: tuple[str, Any], path: str | os.PathLike) -> tuple[int, int]:
    try:
        begin, end = item[1]["data_offsets"]
        return int(begin), int(end)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"tensor {item[0]} has no offsets") from error


def _damaged(path: str | os.PathLike, why: str) -> UsageError:
    return UsageError(f"{path} is a damaged safetensors file: {why}")
