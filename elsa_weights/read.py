"""Reads checkpoint files of unknown origin: nothing in them is executed unless they are trusted.

There is one way: the kind of a file is decided by its first bytes, its pickles are looked through
(`opcodes`), what they ask for and claim is compared with what the file has (`unpickle`), and
`torch.load(weights_only=True)` reads what has passed.
"""

from __future__ import annotations

import io
import os
import pickle
import stat
import struct
import tarfile
import warnings
import zipfile
from typing import IO, Any

import torch

from elsa_core.errors import UsageError, one_line

from . import safetensors
from .opcodes import check_pickle
from .progress import CountedFile, Progress
from .unpickle import ClaimUnpickler, DataUnpickler, NeedsCode, safe_globals

TRUST_FLAG = "--trust-pickle"
# Set to 0 to read an archive whose checksums are wrong or missing.
CRC_VARIABLE = "ELSA_CHECK_CRC"
# How files of torch.save from before PyTorch 1.6 begin: a protocol and a pickled number.
_LEGACY_NUMBER = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5  # number, version, machine, content, keys of the storages
_BLOCK = 2**20
_IN_MEMORY = 2**29
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
    tarfile.TarError,
    zipfile.BadZipFile,
)


# What `read_ahead` has read last, under what tells the file and its content from others.
_ahead: dict[tuple[int, ...], Any] = {}


def read_ahead(path: str | os.PathLike) -> Any:
    """As `read_checkpoint`, and the next `read_checkpoint` of the file takes the same object.

    A check before a run reads what the run then loads, so that both see the same, once.
    """
    content = _ahead.get(_identity(path)) or read_checkpoint(path)
    _ahead.clear()
    _ahead[_identity(path)] = content
    return content


def forget_ahead() -> None:
    """Drops what `read_ahead` keeps, where nothing will take it."""
    _ahead.clear()


def _identity(path: str | os.PathLike) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_checkpoint(path: str | os.PathLike, *, trust: bool = False) -> Any:
    """What is in a .pth, .safetensors or Detectron2's .pkl file; the content decides, not the name.

    Tensors are on the CPU. Objects of known data classes (argparse.Namespace, numpy scalars,
    OpenMMLab's config objects, ...) become `elsa_weights.unpickle.Inert` stand-ins, dicts or lists,
    numpy arrays `elsa_weights.unpickle.Array`. A safetensors file gives
    ``{"state_dict": tensors, "meta": metadata}``.

    The checksums of PyTorch's archives are compared unless the environment has ELSA_CHECK_CRC=0.

    Args:
        trust: execute whatever code the file asks for.

    Raises:
        UsageError: the file cannot be read, is damaged, claims to be larger than it is, or needs
            code to be executed and is not trusted.
    """
    path = os.fspath(path)
    if not trust and (known := _ahead.pop(_identity(path), None)) is not None:
        return known
    try:
        with open(path, "rb", opener=_open_now) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{path} is not a file")
            return _read(file, path, trust)
    except NeedsCode as error:
        raise UsageError(
            f"{path} is refused, because reading it would execute code ({error}): if you trust its "
            f"origin, let tools/convert_weights.py read it with {TRUST_FLAG}"
        ) from error
    except UsageError:
        raise
    except OSError as error:
        if os.path.isdir(path):
            raise UsageError(f"{path} is a directory, not a checkpoint file") from error
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        why = one_line(error) or type(error).__name__
        raise UsageError(f"{path} is damaged or no checkpoint: {why[:300]}") from error


def _open_now(path: str, flags: int) -> int:
    """Opens a pipe without waiting for somebody to write to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read(file: IO[bytes], path: str, trust: bool) -> Any:
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise UsageError(f"{path} is empty")
    head = file.read(16)
    file.seek(0)
    if safetensors.is_safetensors(head[:9], size):
        tensors, metadata = safetensors.load(file, size, path)
        return {"state_dict": tensors, "meta": metadata}
    counted = CountedFile(file, Progress("reading", size), size)
    if head[:4] == b"PK\x03\x04":
        known = _check_zip(file, path, size, trust)
    elif head[:1] != b"\x80":
        raise UsageError(f"{path} is neither a PyTorch, a safetensors nor a pickle file")
    elif head[2 : 2 + len(_LEGACY_NUMBER)] == _LEGACY_NUMBER:
        known = {} if trust else _check_legacy(file, path, size)
    elif trust:
        return pickle.Unpickler(counted, encoding="latin1").load()
    else:
        check_pickle(_for_a_look(file, size))
        file.seek(0)
        return DataUnpickler(counted, encoding="latin1").load()
    file.seek(0)
    try:
        if trust:  # only by --trust-pickle, which is there to execute a file of one's own
            return torch.load(counted, map_location="cpu", weights_only=False)  # type: ignore
        with warnings.catch_warnings(), torch.serialization.safe_globals(safe_globals(known)):
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(counted, map_location="cpu", weights_only=True)  # type: ignore
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} is refused, because PyTorch reads it only by executing code "
            f"({one_line(error)[:200]}): if you trust its origin, let tools/convert_weights.py "
            f"read it with {TRUST_FLAG}"
        ) from error
    finally:
        counted.progress.close()


def _for_a_look(file: IO[bytes], size: int) -> Any:
    """The file from here on; in memory where it is small, which makes each opcode cheaper."""
    if size <= _IN_MEMORY:
        return io.BytesIO(file.read())
    return CountedFile(file, Progress("checking", size), size)


def _check_zip(file: IO[bytes], path: str, size: int, trust: bool) -> dict[tuple[str, str], Any]:
    """The classes and functions that an archive's pickle asks for."""
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
        # PyTorch finds entries without regard to case.
        if len({entry.filename.lower() for entry in entries}) != len(entries):
            raise UsageError(f"{path} has two entries of one name, which no checkpoint has")
        if entries[0].header_offset or archive.comment:
            raise UsageError(f"{path} is an archive with more around it, which no checkpoint has")
        names = {entry.filename: entry.file_size for entry in entries}
        pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise UsageError(f"{path} is an archive, but not one that torch.save makes")
        if os.environ.get(CRC_VARIABLE) != "0":
            _check_sums(archive, path, size)
        if trust:
            return {}
        root = pickles[0].removesuffix("data.pkl")
        content = archive.read(pickles[0])
        check_pickle(io.BytesIO(content))
        claims = ClaimUnpickler(io.BytesIO(content), encoding="utf-8")
        claims.load()
        for key, count in claims.claims.items():
            if count > names.get(f"{root}data/{key}", 0):
                raise UsageError(
                    f"{path} is damaged: a tensor claims {count} bytes and the file has "
                    f"{names.get(f'{root}data/{key}', 0)} for it"
                )
        return claims.known


def _check_sums(archive: zipfile.ZipFile, path: str, size: int) -> None:
    progress = Progress("checking", size)
    try:
        for entry in archive.infolist():
            with archive.open(entry) as record:
                while block := record.read(_BLOCK):
                    progress.add(len(block))
    except zipfile.BadZipFile as error:
        raise UsageError(
            f"{path} is damaged: {one_line(error)} (the environment variable {CRC_VARIABLE}=0 "
            "reads it all the same)"
        ) from error
    finally:
        progress.close()


def _check_legacy(file: IO[bytes], path: str, size: int) -> dict[tuple[str, str], Any]:
    """The classes and functions that the pickles ask for."""
    try:
        tarfile.open(fileobj=file, mode="r:").close()
    except tarfile.TarError:
        file.seek(0)
    else:
        raise UsageError(f"{path} is a tar archive of PyTorch 0.1, which is not read")
    look = _for_a_look(file, size)
    for _ in range(_LEGACY_PICKLES):
        check_pickle(look)
    file.seek(0)
    counted = CountedFile(file, Progress("", 0, show=False), size)
    known: dict[tuple[str, str], Any] = {}
    claimed = 0
    for _ in range(_LEGACY_PICKLES):
        claims = ClaimUnpickler(counted)
        claims.load()
        known |= claims.known
        claimed += sum(claims.claims.values())
    if claimed > size:
        raise pickle.UnpicklingError(f"its tensors claim {claimed} bytes, it has {size}")
    return known
