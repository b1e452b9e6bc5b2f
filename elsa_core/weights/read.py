"""Read checkpoint files of unknown origin without executing code in them, unless they are trusted.

The first bytes decide the kind of the file. `opcodes` checks its pickles, `unpickle` compares their
imports and sizes with the content of the file, and `torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import io
import os
import pickle
import stat
import struct
import warnings
import zipfile
from typing import IO, Any

import torch

from elsa_core.runtime.errors import UsageError, one_line

from . import safetensors
from .opcodes import PickleLook
from .progress import CountedFile, progress_bar
from .unpickle import ClaimUnpickler, DataUnpickler, UnsafePickle, safe_globals

TRUST_FLAG = "--trust-pickle"
# Set to 0 to read an archive whose checksums are wrong or missing.
CRC_VARIABLE = "ELSA_CHECK_CRC"
# Beginning of torch.save files from before PyTorch 1.6: a protocol and a pickled number.
_LEGACY_NUMBER = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_VERSION = 1001
_LEGACY_PICKLES = 5  # number, version, machine, content, keys of the storages
_BLOCK = 2**20
# Records of an archive (a checkpoint has one per tensor and a few more), and bytes of each in the
# table.
MAX_RECORDS = 25_000
MAX_RECORD_BYTES = 512
# End of an archive: a record of 56 bytes for large archives, a pointer to it, and the end record.
_UTF_8 = 0x800  # the flag of a name
_END, _POINTER, _LARGE_END = "<4s3HH2IH", "<4s4xQ4x", "<4s20x4Q"
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


# Identity of the file that `read_ahead` read last -> its content.
_ahead: dict[tuple[int, ...], Any] = {}


def read_ahead(path: str | os.PathLike) -> Any:
    """Variant of `read_checkpoint` whose result the next `read_checkpoint` of the file returns.

    A check before a run and the run itself then see the same content and read it once.
    """
    identity = _identity(path)
    content = read_checkpoint(path)
    _ahead.clear()
    if identity and identity == _identity(path):
        _ahead[identity] = content
    return content


def forget_ahead() -> None:
    """Drop the content that `read_ahead` keeps, if nothing will read it."""
    _ahead.clear()


def _identity(path: str | os.PathLike) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times


def read_checkpoint(path: str | os.PathLike, *, trust: bool = False) -> Any:
    """Return the content of a .pth, .safetensors or Detectron2 .pkl file.

    The content decides the format, not the name. Tensors are on the CPU. Objects of known data
    classes (argparse.Namespace, numpy scalars, OpenMMLab's config objects, ...) become an
    `unpickle.StandIn`, dicts or lists, numpy arrays `unpickle.Array`. A safetensors file gives
    ``{"state_dict": tensors, "meta": metadata}``.

    Checksums of PyTorch's archives are verified unless the environment has ELSA_CHECK_CRC=0.

    Args:
        trust: execute any code that the file contains.

    Raises:
        UsageError: the file cannot be read, is damaged, claims to be larger than it is, or
            contains code and is not trusted.
    """
    path = os.fspath(path)
    if not trust and (identity := _identity(path)) in _ahead:
        return _ahead.pop(identity)
    try:
        with open(path, "rb", opener=_open_now) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{path} is not a file")
            return _read(file, path, trust)
    except UnsafePickle as error:
        raise UsageError(
            f"{path} is refused, because reading it would execute code ({one_line(error)}): if you "
            f"trust its origin, let tools/convert_weights.py read it with {TRUST_FLAG}"
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
    """Open a file; do not wait for a writer if it is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read(file: IO[bytes], path: str, trust: bool) -> Any:
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise UsageError(f"{path} is empty")
    head = file.read(16)
    file.seek(0)
    if safetensors.is_safetensors(head[:9], size):
        with _again(file, size, "reading") as source:
            tensors, metadata = safetensors.load(source, path)
        return {"state_dict": tensors, "meta": metadata}
    if head[:4] == b"PK\x03\x04":
        known = _check_zip(file, path, size, trust)
    elif head[:1] != b"\x80":
        raise UsageError(f"{path} is neither a PyTorch, a safetensors nor a pickle file")
    elif head[2 : 2 + len(_LEGACY_NUMBER)] == _LEGACY_NUMBER:
        known = {} if trust else _check_legacy(file, path, size)
    else:
        if not trust:
            PickleLook(pytorch=False).check(io.BytesIO(file.read()))
        with _again(file, size, "reading") as source:
            unpickler = pickle.Unpickler if trust else DataUnpickler
            return unpickler(source, encoding="latin1").load()
    try:
        with _again(file, size, "reading") as source:
            if trust:  # only with --trust-pickle, which executes a user's own file
                return torch.load(source, map_location="cpu", weights_only=False)
            with warnings.catch_warnings(), torch.serialization.safe_globals(safe_globals(known)):
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Keep PyTorch's reason without its advice.
        why = one_line(error).rpartition("WeightsUnpickler error: ")[2].partition(" Check the ")[0]
        raise UsageError(
            f"{path} is refused by torch.load(weights_only=True) ({why[:200]}): if you trust its "
            f"origin, let tools/convert_weights.py read it with {TRUST_FLAG}"
        ) from error


def _again(file: IO[bytes], size: int, what: str) -> io.BufferedReader:
    """Return the file at its beginning, with a large buffer and a progress bar."""
    file.seek(0)
    return io.BufferedReader(CountedFile(file, what, size), _BLOCK)


def _check_zip(file: IO[bytes], path: str, size: int, trust: bool) -> dict[tuple[str, str], Any]:
    """Check an archive. Return the classes and functions that its pickle imports."""
    _check_end(file, path, size)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # Not filename: zipfile cuts it at a NUL, and may take it from a field that PyTorch ignores.
        names = {entry.orig_filename: entry.file_size for entry in entries}
        root = next(iter(names), "").partition("/")[0] + "/"
        if f"{root}constants.pkl" in names:
            raise UsageError(f"{path} is a TorchScript program, not a checkpoint")
        if not names.keys() >= {f"{root}data.pkl", f"{root}version"}:
            raise UsageError(f"{path} is an archive, but not one that torch.save makes")
        claimed = sum(entry.file_size for entry in entries)
        stored = all(
            entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
            for entry in entries
        )
        if claimed > size or not stored:
            raise UsageError(
                f"{path} claims {claimed} bytes of content and has {size}, "
                "which no checkpoint of PyTorch does"
            )
        # PyTorch ignores case when it looks up entries,
        if len({name.lower() for name in names}) != len(entries):
            raise UsageError(f"{path} has two entries of one name, which no checkpoint has")
        # and compares their bytes.
        utf_8 = all(entry.flag_bits & _UTF_8 for entry in entries)
        if not all(name.isprintable() and (utf_8 or name.isascii()) for name in names):
            raise UsageError(f"{path} has names in an unknown encoding")
        if os.environ.get(CRC_VARIABLE) != "0":
            _check_sums(archive, path, size)
        if trust:
            return {}
    file.seek(0)
    # The record that PyTorch itself takes for the pickle, however the archive is crafted.
    content = torch._C.PyTorchFileReader(file).get_record("data.pkl")
    PickleLook(pytorch=True).check(io.BytesIO(content))
    claims = ClaimUnpickler(io.BytesIO(content), encoding="utf-8")
    claims.load()
    for key, count in claims.claims.items():
        if count != names.get(f"{root}data/{key}", 0):
            raise UsageError(
                f"{path} is damaged: a tensor claims {count} bytes and the file has "
                f"{names.get(f'{root}data/{key}', 0)} for it"
            )
    return claims.known


def _check_end(file: IO[bytes], path: str, size: int) -> None:
    """Find the table of an archive's records. Refuse an archive that zipfile and PyTorch could read
    differently, or that takes long to read."""
    lengths = [struct.calcsize(layout) for layout in (_LARGE_END, _POINTER, _END)]
    file.seek(max(0, size - sum(lengths)))
    large, pointer, end = (file.read(length) for length in lengths)
    if size < sum(lengths) or end[:4] != b"PK\x05\x06":
        raise UsageError(f"{path} is cut off: the end of the archive is missing")
    *_, number, length, start, comment = struct.unpack(_END, end)
    table_end = size - lengths[2]
    whole = not comment
    if pointer[:4] == b"PK\x06\x07":
        table_end = size - sum(lengths)
        *_, wide_number, wide_length, wide_start = struct.unpack(_LARGE_END, large)
        whole &= large[:4] == b"PK\x06\x06" and struct.unpack(_POINTER, pointer)[1] == table_end
        whole &= number in (wide_number, 0xFFFF)
        whole &= length in (wide_length, 0xFFFFFFFF) and start in (wide_start, 0xFFFFFFFF)
        number, length, start = wide_number, wide_length, wide_start
    if not whole or start + length != table_end:
        raise UsageError(f"{path} is an archive with more around it, which no checkpoint has")
    if number > MAX_RECORDS or length > MAX_RECORD_BYTES * number:
        raise UsageError(
            f"{path} has {number} records in {length} bytes, at most {MAX_RECORDS} of "
            f"{MAX_RECORD_BYTES} bytes are read"
        )


def _check_sums(archive: zipfile.ZipFile, path: str, size: int) -> None:
    bar = progress_bar("checking", size)
    try:
        for entry in archive.infolist():
            with archive.open(entry) as record:
                while block := record.read(_BLOCK):
                    bar.update(len(block))
    except zipfile.BadZipFile as error:
        raise UsageError(
            f"{path} is damaged: {one_line(error)} (the environment variable {CRC_VARIABLE}=0 "
            "reads it all the same)"
        ) from error
    finally:
        bar.close()


def _check_legacy(file: IO[bytes], path: str, size: int) -> dict[tuple[str, str], Any]:
    """Check a file from before PyTorch 1.6. Return the classes and functions that it imports."""
    with _again(file, size, "checking") as source:
        look = PickleLook(pytorch=True)
        for _ in range(_LEGACY_PICKLES):
            look.check(source)
    with _again(file, size, "checking") as source:
        claims = [ClaimUnpickler(source, encoding="utf-8") for _ in range(_LEGACY_PICKLES)]
        _, version, machine, _, stored = [one.load() for one in claims]
    if version != _LEGACY_VERSION or not isinstance(machine, dict):
        raise pickle.UnpicklingError("its version is not described as it should be")
    claimed = {key: count for one in claims for key, count in one.claims.items()}
    if sum(claimed.values()) > size:
        raise pickle.UnpicklingError(
            f"its tensors claim {sum(claimed.values())} bytes, it has {size}"
        )
    # PyTorch leaves storages that are not listed uninitialised.
    if not isinstance(stored, list) or sorted(stored) != sorted(claimed):
        raise pickle.UnpicklingError("the list of its storages is not that of its tensors'")
    return {key: value for one in claims for key, value in one.known.items()}
