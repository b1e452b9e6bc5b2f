"""Checkpoint files that an attacker, a damaged disk or a fuzzer makes.

Each function writes one to a path. ``code`` is a pickle without its protocol and its end, which
leaves a file "executed" in the current folder when it is read by `pickle`.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

MARK = "executed"


class _Attack:
    def __reduce__(self):
        return os.mkdir, (MARK,)


EVIL = pickle.dumps(_Attack(), 2)
_STATE = {"state_dict": {"weight": torch.zeros(3)}}


def _zip() -> list[tuple[str, bytes]]:
    file = io.BytesIO()
    torch.save(_STATE, file)
    with zipfile.ZipFile(file) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def _write_zip(path: Path, entries: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)


def _legacy() -> bytes:
    file = io.BytesIO()
    torch.save(_STATE, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _pickles(content: bytes) -> list[bytes]:
    """The five of a file from before PyTorch 1.6, and what follows."""
    file, parts = io.BytesIO(content), []
    for _ in range(5):
        start = file.tell()
        list(pickletools.genops(file))
        parts.append(content[start : file.tell()])
    return [*parts, content[file.tell() :]]


def plain(path: Path) -> None:
    path.write_bytes(EVIL)


def in_a_zip(path: Path) -> None:
    _write_zip(path, [(n, EVIL if n.endswith("data.pkl") else data) for n, data in _zip()])


def in_a_legacy_file(path: Path) -> None:
    parts = _pickles(_legacy())
    parts[3] = EVIL
    path.write_bytes(b"".join(parts))


def as_safetensors(path: Path) -> None:
    """Its first eight bytes are a length and the ninth is a brace, or BINBYTES of four bytes."""
    path.write_bytes(b"B\x04\x00\x00\x00\x00\x00\x00{" + EVIL + b" " * 1200)


def doubled_entry(path: Path) -> None:
    """`zipfile` reads the last of two entries, PyTorch the first."""
    entries = [(n.partition("/")[2], data) for n, data in _zip()]
    _write_zip(path, [("archive/data.pkl", EVIL), *((f"archive/{n}", data) for n, data in entries)])


def entry_of_other_case(path: Path) -> None:
    """PyTorch finds entries without regard to case."""
    entries = [(n.partition("/")[2], data) for n, data in _zip()]
    _write_zip(path, [("archive/DATA.pkl", EVIL), *((f"archive/{n}", data) for n, data in entries)])


def fifth_pickle(path: Path) -> None:
    parts = _pickles(_legacy())
    parts[4] = EVIL
    path.write_bytes(b"".join(parts))


def tar_and_legacy(path: Path) -> None:
    """A tar archive of PyTorch 0.1 whose first name is also the beginning of a legacy file."""
    first = b"".join(_pickles(_legacy())[:3])
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(EVIL)
            archive.addfile(entry, io.BytesIO(EVIL))
    content = bytearray(file.getvalue())
    content[: len(first[:100])] = first[:100]
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)


EXECUTING: dict[str, Callable[[Path], None]] = {
    one.__name__: one
    for one in (
        *(plain, in_a_zip, in_a_legacy_file, as_safetensors, doubled_entry, entry_of_other_case),
        *(fifth_pickle, tar_and_legacy),
    )
}


_TWICE = b"q\x00h\x00\x86"

# What a pickle can ask for: [its content between protocol and end, words of the refusal].
EXHAUSTING: dict[str, tuple[bytes, str]] = {
    "memo index": (b"}r" + struct.pack("<I", 10**9), "1000000000 places of memory"),
    "key of 2^60 parts": (b"})" + _TWICE * 60 + b"K\x01s", "each reference counted"),
    "set of 2^60 parts": (
        b"cbuiltins\nset\n(])" + _TWICE * 60 + b"atR",
        "each reference counted",
    ),
    "frozenset of 2^60 parts": (b"\x8f()" + _TWICE * 60 + b"\x90", "each reference counted"),
    "dtype of 2^40 parts": (
        b"cnumpy\ndtype\n)" + _TWICE * 40 + b"\x85R",
        "each reference counted",
    ),
    "key of a storage of 2^40 parts": (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n)"
        + _TWICE * 40
        + b"X\x03\x00\x00\x00cpuK\x01tQ",
        "each reference counted",
    ),
    "key of 500,000 tuples": (b"})" + b"\x85" * 500_000 + b"K\x01s", "more than 100 deep"),
    "500,000 lists": (b"]" * 500_000 + b"a" * 499_999, "more than 100 deep"),
    "a list in itself": (b"]q\x00h\x00a", "holds itself"),
    "a list changed after its use": (b"]q\x00]h\x00ah\x00]a0", "changed after its use"),
    "an integer of 40,000 bytes": (
        b"\x8b" + struct.pack("<i", 40_000) + b"\x01" * 40_000,
        "an integer of 40000 bytes",
    ),
    "a shape of large integers": (
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4tR0"
        + b"cnumpy.core.multiarray\n_reconstruct\n)R"
        + b"(K\x01(" + b"\x8a\x20" + b"\x01" * 32 + b"K\x02tcnumpy\ndtype\n(X\x02\x00\x00\x00f4tR"
        + b"\x89C\x04\x00\x00\x00\x00tb",
        "below 2^63",
    ),
    "integers of equal hashes": (
        b"}(" + b"".join(
            b"\x8a\x14" + ((2**61 - 1) * n).to_bytes(20, "little", signed=True) + b"N"
            for n in range(10_000)
        ) + b"u",
        "more than 1000",
    ),
    "1,000,000 lists": (b"]" * 1_000_000 + b"0" * 999_999, "more than 1000000 opcodes"),
    "a text of 2^62 bytes": (b"\x8d" + struct.pack("<Q", 2**62), "damaged"),
    "a module of PyTorch": (b"ctorch\n_inductor\n", "torch._inductor"),
}  # fmt: skip


def exhausting(name: str) -> bytes:
    return b"\x80\x04" + EXHAUSTING[name][0] + b"."


def _cut(content: bytearray) -> bytearray:
    return content[:-30]


def _emptied(content: bytearray) -> bytearray:
    return bytearray()


def _zeroed(content: bytearray) -> bytearray:
    """In the middle, as a disk may leave it after a power cut."""
    middle = len(content) // 2
    content[middle : middle + 512] = bytes(512)
    return content


def _flipped(content: bytearray) -> bytearray:
    content[len(content) // 2] ^= 1
    return content


def _removed(content: bytearray) -> None:
    return None


DAMAGES: dict[str, Callable[[bytearray], bytearray | None]] = {
    one.__name__[1:]: one for one in (_cut, _emptied, _zeroed, _flipped, _removed)
}


def damage(path: Path, name: str) -> None:
    """To a checkpoint that torch.save has written."""
    if (content := DAMAGES[name](bytearray(path.read_bytes()))) is None:
        path.unlink()
    else:
        path.write_bytes(content)


# What may stand in last_checkpoint besides a name.
ODD_NOTES = [b"", b"\xff\xfe\x00", b"a" * 100_000, b".", b"..", b"/dev/null", b"none.pth", b"a\0b"]
