"""The safetensors format: a JSON header with names, types, shapes and offsets, then raw bytes.

Source: the format's description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor

from elsa_core.runtime.errors import UsageError, one_line

from .progress import Progress

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
# Of 80,000 tensors: JSON takes twenty times its size in memory.
MAX_HEADER = 8 * 10**6
MAX_DIMENSIONS = 64
_BLOCK = 2**20


def load(file: IO[bytes], size: int, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, which share one buffer, and the metadata.

    Args:
        file: at its beginning, of ``size`` bytes.
        path: of the file, for messages.

    Raises UsageError for a file that is cut off or contradicts itself.
    """
    header, start = _read_header(file, size, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata is no JSON object of texts")
    memory = bytearray(size - start)
    progress = Progress("reading", size)
    for begin in range(0, len(memory), _BLOCK):
        block = memoryview(memory)[begin : begin + _BLOCK]
        if file.readinto(block) != len(block):  # type: ignore[attr-defined]
            raise _damaged(path, "it was cut off while it was read")
        progress.add(len(block))
    progress.close()
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item, path)):
        try:
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin, stop = entry["data_offsets"]
            counts = len(shape) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)
            count = math.prod(shape) if counts and max(shape, default=0) < 2**63 else -1
            whole = stop - begin == count * dtype.itemsize
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"tensor {name} is not described as it should be") from error
        if not whole or begin != end or start + stop > size:
            raise _damaged(path, f"tensor {name} claims bytes that the file does not have")
        end = stop
        if count:
            tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin)
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
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, one_line(error)) from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is no JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the header has two entries of one name")
    return found


def _begin(item: tuple[str, Any], path: str) -> tuple[int, int]:
    try:
        begin, end = item[1]["data_offsets"]
        if type(begin) is not int or type(end) is not int:
            raise TypeError
        return begin, end
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"tensor {item[0]} has no offsets") from error


def _damaged(path: str, why: str) -> UsageError:
    return UsageError(f"{path} is a damaged safetensors file: {' '.join(why.split())[:300]}")
