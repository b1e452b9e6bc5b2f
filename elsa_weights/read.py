"""Reads checkpoint files of unknown origin: nothing in them is executed unless they are trusted."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from typing import IO, Any

import torch

from elsa_core.errors import UsageError, one_line

from . import safetensors
from .progress import CountedFile, Progress
from .unpickle import DATA_PICKLE, ClaimUnpickler, DataUnpickler, NeedsCode

TRUST_FLAG = "--trust-pickle"
# How files of torch.save from before PyTorch 1.6 begin: a pickled number.
_LEGACY_NUMBER = 0x1950A86A20F9469CFC6C
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


def read_checkpoint(path: str | os.PathLike, *, trust: bool = False) -> Any:
    """What is in a .pth, .safetensors or Detectron2's .pkl file; the content decides, not the name.

    Tensors are on the CPU. Objects of known data classes (argparse.Namespace, numpy scalars,
    OpenMMLab's config objects, ...) become `elsa_weights.unpickle.Inert` stand-ins, numpy arrays
    `elsa_weights.unpickle.Array`. A safetensors file gives
    ``{"state_dict": tensors, "meta": metadata}``.

    Args:
        trust: execute whatever code the file asks for.

    Raises:
        UsageError: the file cannot be read, is damaged, claims to be larger than it is, or needs
            code to be executed and is not trusted.
    """
    return _guarded(os.fspath(path), trust, load=True)


def check_checkpoint(path: str | os.PathLike) -> None:
    """Raises UsageError where `read_checkpoint` would refuse a file; keeps no tensors in memory."""
    _guarded(os.fspath(path), trust=False, load=False)


def _guarded(path: str, trust: bool, load: bool) -> Any:
    """`_read`, whose errors become sentences."""
    if os.path.isdir(path):
        raise UsageError(f"{path} is a directory, not a checkpoint file")
    try:
        with open(path, "rb") as file:
            return _read(file, path, trust, load)
    except NeedsCode as error:
        raise UsageError(
            f"{path} is refused, because reading it would execute code ({error}): if you trust its "
            f"origin, let tools/convert_weights.py read it with {TRUST_FLAG}"
        ) from error
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        why = one_line(error) or type(error).__name__
        raise UsageError(f"{path} is damaged or no checkpoint: {why[:300]}") from error


def _read(file: IO[bytes], path: str, trust: bool, load: bool) -> Any:
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise UsageError(f"{path} is empty")
    head = file.read(9)
    file.seek(0)
    if safetensors.is_safetensors(head, size):
        if not load:
            return None
        tensors, metadata = safetensors.load(path)
        return {"state_dict": tensors, "meta": metadata}
    if head[:4] == b"PK\x03\x04":
        return _read_zip(file, path, size, trust, load)
    if head[:1] != b"\x80":
        raise UsageError(f"{path} is neither a PyTorch, a safetensors nor a pickle file")
    if _is_legacy(file, size):
        return _read_legacy(file, size, trust, load)
    counted = CountedFile(file, Progress("reading", size), size)
    unpickler = pickle.Unpickler if trust else DataUnpickler
    result = unpickler(counted, encoding="latin1").load()
    counted.progress.close()
    return result


def _read_zip(file: IO[bytes], path: str, size: int, trust: bool, load: bool) -> Any:
    if not zipfile.is_zipfile(file):
        raise UsageError(f"{path} is cut off: the end of the archive is missing")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise UsageError(f"{path} is a TorchScript program, not a checkpoint")
        claimed = sum(entry.file_size for entry in entries)
        if claimed > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UsageError(
                f"{path} claims {claimed} bytes of content and has {size}, "
                "which no checkpoint of PyTorch does"
            )
        names = {entry.filename: entry.file_size for entry in entries}
        pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise UsageError(f"{path} is an archive, but not one that torch.save makes")
        root = pickles[0].removesuffix("data.pkl")
        if not trust:
            claims = ClaimUnpickler(io.BytesIO(archive.read(pickles[0])), encoding="utf-8")
            claims.load()
            for key, count in claims.claims.items():
                if count > names.get(f"{root}data/{key}", 0):
                    raise UsageError(
                        f"{path} is damaged: a tensor claims {count} bytes and the file has "
                        f"{names.get(f'{root}data/{key}', 0)} for it"
                    )
    file.seek(0)
    return _torch_load(file, size, trust) if load else None


def _is_legacy(file: IO[bytes], size: int) -> bool:
    try:
        number = DataUnpickler(CountedFile(file, Progress("", 0, show=False), size)).load()
    except (*_DAMAGE, NeedsCode):
        number = None
    file.seek(0)
    return number == _LEGACY_NUMBER


def _read_legacy(file: IO[bytes], size: int, trust: bool, load: bool) -> Any:
    if not trust:
        counted = CountedFile(file, Progress("", 0, show=False), size)
        for _ in range(3):  # magic number, version, description of the machine
            DataUnpickler(counted).load()
        claims = ClaimUnpickler(counted)
        claims.load()
        claimed = sum(claims.claims.values())
        if claimed > size:
            raise pickle.UnpicklingError(f"its tensors claim {claimed} bytes, it has {size}")
        file.seek(0)
    return _torch_load(file, size, trust) if load else None


def _torch_load(file: IO[bytes], size: int, trust: bool) -> Any:
    counted: Any = CountedFile(file, Progress("reading", size), size)
    try:
        if trust:
            return torch.load(counted, map_location="cpu", weights_only=False)
        try:
            return torch.load(counted, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            file.seek(0)
        # Objects that torch does not know: read as data, as the first look has shown they are.
        return torch.load(
            counted, map_location="cpu", weights_only=False, pickle_module=DATA_PICKLE
        )
    finally:
        counted.progress.close()
