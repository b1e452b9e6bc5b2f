"""Checkpoint files that an attacker, a damaged disk or a fuzzer makes.

Each function writes one to a path. ``code`` is a pickle without its protocol and its end, which
leaves a file "executed" in the current folder when it is read by `pickle`.
"""

from __future__ import annotations

import io
import itertools
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
_STATE = {"state_dict": {"weight": torch.zeros(4)}}


def _zip(state: object = _STATE) -> list[tuple[str, bytes]]:
    file = io.BytesIO()
    torch.save(state, file)
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


def with_pickle(path: Path, content: bytes) -> None:
    """An archive of torch.save with another pickle."""
    _write_zip(path, [(n, content if n.endswith("data.pkl") else data) for n, data in _zip()])


def _with_part(path: Path, part: int, content: bytes) -> None:
    """A file from before PyTorch 1.6 with another pickle in one of its five places."""
    parts = _pickles(_legacy())
    parts[part] = content
    path.write_bytes(b"".join(parts))


def _with_record(path: Path, name: str) -> None:
    """An archive with another record in front."""
    entries = [(n.partition("/")[2], data) for n, data in _zip()]
    _write_zip(path, [(name, EVIL), *((f"archive/{n}", data) for n, data in entries)])


def _pickle_in_a_zip(value: object) -> bytes:
    ((_, content),) = [e for e in _zip(value) if e[0].endswith("data.pkl")]
    return content


def plain(path: Path) -> None:
    path.write_bytes(EVIL)


def in_a_zip(path: Path) -> None:
    with_pickle(path, EVIL)


def in_a_legacy_file(path: Path) -> None:
    _with_part(path, 3, EVIL)


def as_safetensors(path: Path) -> None:
    """Its first eight bytes are a length and the ninth is a brace, or BINBYTES of four bytes."""
    path.write_bytes(b"B\x04\x00\x00\x00\x00\x00\x00{" + EVIL + b" " * 1200)


def doubled_entry(path: Path) -> None:
    """`zipfile` reads the last of two entries, PyTorch the first."""
    _with_record(path, "archive/data.pkl")


def entry_of_other_case(path: Path) -> None:
    """PyTorch finds entries without regard to case."""
    _with_record(path, "archive/DATA.pkl")


def fifth_pickle(path: Path) -> None:
    _with_part(path, 4, EVIL)


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
# Floats of one hash, as places of the memo, and 30,000 tuples of them.
_FLOATS = b"".join(
    b"G" + struct.pack(">d", 2.0 ** (61 * n)) + b"q%c" % (n + 16) for n in range(-16, 17)
)
_COLLIDING = b"".join(
    b"(" + b"".join(b"h%c" % place for place in places) + b"t"
    for places in itertools.islice(itertools.product(range(33), repeat=4), 30_000)
)
_LARGE = b"(" + b"K\x01" * 9 + b"tq\x28(" + b"h\x28" * 9 + b"tq\x29(" + b"h\x29" * 9 + b"tq\x2a"
_LARGE_KEYS = b"".join(b"h\x2ah%ch%c\x86\x86N" % (n % 33, n // 33) for n in range(900))
_TEXT = b"X" + struct.pack("<I", 2**23) + b"a" * 2**23
_EQUAL = "may have to be compared"
_COUNTED = "each reference counted"

# What a pickle can ask for: [its content between protocol and end, words of the refusal].
EXHAUSTING: dict[str, tuple[bytes, str]] = {
    "memo index": (b"}r" + struct.pack("<I", 10**9), "1000000000 places of memory"),
    "key of 2^60 parts": (b"})" + _TWICE * 60 + b"K\x01s", _COUNTED),
    "set of 2^60 parts": (b"cbuiltins\nset\n(])" + _TWICE * 60 + b"atR", _COUNTED),
    "frozenset of 2^60 parts": (b"cbuiltins\nfrozenset\n])" + _TWICE * 60 + b"a\x85R", _COUNTED),
    "dtype of 2^40 parts": (b"cnumpy\ndtype\n)" + _TWICE * 40 + b"\x85R", _COUNTED),
    "key of a storage of 2^40 parts": (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n)"
        + _TWICE * 40
        + b"X\x03\x00\x00\x00cpuK\x01tQ",
        _COUNTED,
    ),
    "key of 500,000 tuples": (b"})" + b"\x85" * 500_000 + b"K\x01s", "more than 100 deep"),
    "200,000 lists": (b"]" * 200_000 + b"a" * 199_999, "more than 100 deep"),
    "a list in itself": (b"]q\x00h\x00a", "holds itself"),
    "a list changed after its use": (b"]q\x00]h\x00ah\x00]a", "changed after its use"),
    "an integer of 255 bytes": (b"\x8a\xff" + b"\x01" * 255, "an integer of 255 bytes"),
    "a shape of large integers": (
        b"cnumpy.core.multiarray\n_reconstruct\n)R"
        + b"(K\x01(" + b"\x8a\x20" + b"\x01" * 32 + b"K\x02tcnumpy\ndtype\n(X\x02\x00\x00\x00f4tR"
        + b"\x89X\x04\x00\x00\x00\x00\x00\x00\x00tb",
        "below 2^63",
    ),
    "a set of equal hashes": (_FLOATS + b"cbuiltins\nset\n](" + _COLLIDING + b"e\x85R", _EQUAL),
    "a frozenset by NEWOBJ": (
        _FLOATS + b"cbuiltins\nfrozenset\n](" + _COLLIDING + b"e\x85\x81",
        _EQUAL,
    ),
    "a set of the keys of a dict": (
        b"cbuiltins\nset\nccollections\nOrderedDict\n)RK\x01Ns\x85R",
        "a set of what is no list",
    ),
    "a set by a function": (
        b"ctorch._utils\n_rebuild_parameter\ncbuiltins\nset\n\x89N\x87R](K\x01e\x85R",
        "a call of what is no class",
    ),
    "a set of a tensor": (
        b"cbuiltins\nset\nctorch._utils\n_rebuild_parameter\nK\x01\x85R\x85R",
        "a set of what is no list",
    ),
    "a shape of keys": (
        b"ctorch\nSize\nccollections\nCounter\n(K\x01K\x02t\x85R\x85R",
        "a Size of what is no list",
    ),
    "attributes of equal hashes": (
        b"cargparse\nNamespace\n)R}(K\x01Nub",
        "an attribute without a name",
    ),
    "an attribute that hides a method": (
        b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x05sb",
        "a dict with the attribute 'items'",
    ),
    "attributes in pairs": (
        b"ccollections\nOrderedDict\n)Rccollections\nOrderedDict\n]]X\5\0\0\0itemsaK\5aa\x85Rb",
        "in no dict",
    ),
    "a parameter that is set again": (
        b"ctorch._utils\n_rebuild_parameter\nK\1\x85R)b",
        "changed after it was made",
    ),
    "a dict of numbers": (b"ccollections\nOrderedDict\n]K\1a\x85R", "no pair"),
    "numbers whose places are taken": (
        b"}(" + b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(60_000))
        + b"".join(b"J" + struct.pack("<i", n) + b"N" for n in range(10**6, 10**6 + 2000)) + b"u",
        _EQUAL,
    ),
    "an item at a slice": (b"](K\x01K\x02eK\x01K\x02s", "items of an object that has none"),
    "a text of 2^27 letters": (
        b"X" + struct.pack("<I", 2**27 + 1) + b"a" * 7,
        "a text of 134217729 bytes",
    ),
    "a codec in Python": (
        b"cbuiltins\nbytearray\nX\x01\x00\x00\x00aX\x08\x00\x00\x00punycode\x86R",
        "the codec punycode",
    ),
    "a long element type": (
        b"cnumpy\ndtype\nX\x11\x00\x00\x00" + b"f" * 17 + b"\x85R",
        "numpy element type",
    ),
    "a name of a million letters": (
        b"c__builtin__\ngetattr\ncargparse\nNamespace\nX" + struct.pack("<I", 10**6)
        + b"a" * 10**6 + b"\x86R",
        "an attribute without a name",
    ),
    "a set as a tensor": (
        _FLOATS + b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nset\nN("
        + _COLLIDING + b"NtNtR",
        "would execute code",
    ),
    "large keys of equal hashes": (_FLOATS + _LARGE + b"}(" + _LARGE_KEYS + b"u", _EQUAL),
    "a text given to functions": (
        _TEXT + b"q\x00c_codecs\nencode\nq\x01h\x00X\x06\x00\x00\x00latin1\x86q\x02]("
        + b"h\x01h\x02R" * 1000 + b"e",
        "bytes of text",
    ),
    "integers of equal hashes": (
        b"}(" + b"".join(
            b"\x8a\x14" + ((2**61 - 1) * n).to_bytes(20, "little", signed=True) + b"N"
            for n in range(12_000)
        ) + b"u",
        _EQUAL,
    ),
    "500,000 lists": (b"]" * 500_000, "more than 400000 opcodes"),
    "120,000 calls": (
        b"](ccollections\nOrderedDict\nq\x00" + b"h\x00)R" * 120_000 + b"e",
        "more than 400000 opcodes",
    ),
    "a text of 2^62 bytes": (b"\x8d" + struct.pack("<Q", 2**62), "asks for"),
    "a text of 2^31 bytes": (b"X" + struct.pack("<I", 2**31), "a text of 2147483648 bytes"),
    "a module of PyTorch": (b"ctorch\n_inductor\n", "torch._inductor"),
}  # fmt: skip


def exhausting(name: str) -> bytes:
    return b"\x80\x02" + EXHAUSTING[name][0] + b"."


def nested_root(path: Path) -> None:
    """PyTorch looks for x/data.pkl, in any case."""
    entries = [("x/" + n.partition("/")[2], data) for n, data in _zip()]
    upper = [(n.replace("data.pkl", "DATA.PKL"), data) for n, data in entries]
    _write_zip(path, [*upper, ("x/y/data.pkl", pickle.dumps({}, 2))])


def two_tables(path: Path) -> None:
    """Of two ends of the table of records, one is where `zipfile` looks, one where PyTorch does."""
    file = io.BytesIO()
    torch.save(_STATE, file)
    content = file.getvalue()
    large = content[-98:-42]
    path.write_bytes(content[:-98] + large + content[-98:])


def many_records(path: Path) -> None:
    file = io.BytesIO()
    torch.save(_STATE, file)
    content = bytearray(file.getvalue())
    struct.pack_into("<QQ", content, len(content) - 74, 10**6, 10**6)
    struct.pack_into("<HH", content, len(content) - 14, 0xFFFF, 0xFFFF)
    path.write_bytes(content)


def two_encodings(path: Path) -> None:
    """Of one name in bytes, `zipfile` makes two and PyTorch one."""
    _write_zip(path, [*_zip(), ("archive/data/\u00e9", b"")])


def zero_in_a_name(path: Path) -> None:
    """PyTorch takes the part before it."""
    _write_zip(path, [*_zip(), ("archive/data/0xx", b"")])
    path.write_bytes(path.read_bytes().replace(b"archive/data/0xx", b"archive/data/0\0x"))


def two_sizes(path: Path) -> None:
    """The checksum is that of the smaller one, PyTorch reads the larger one."""
    with_pickle(path, pickle.dumps({}, 2))
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.rindex(b"PK\1\2") + 24, 0)
    path.write_bytes(content)


def two_types(path: Path) -> None:
    """PyTorch takes the first one, or gives the second tensor memory as it finds it."""
    tensors = [torch.zeros(4), torch.zeros(4, dtype=torch.int32)]
    content = _pickle_in_a_zip(tensors)
    with_pickle(path, content.replace(b"X\1\0\0\0001", b"X\1\0\0\0000"))


def storage_in_a_storage(path: Path) -> None:
    """Growing the outer one leaves the inner one with freed memory."""
    parts = _pickles(_legacy())
    assert b"K\4Nt" in parts[3]
    parts[3] = parts[3].replace(b"K\4Nt", b"K\4(X\1\0\0\0vK\0K\4tt")
    path.write_bytes(b"".join(parts))


def other_version(path: Path) -> None:
    """PyTorch writes whatever stands there into its message."""
    _with_part(path, 1, pickle.dumps([1001], 2))


def _framed(content: bytes, end: int) -> Callable[[Path], None]:
    """Python's unpickler and pickletools differ where a frame ends inside an opcode."""
    frame = b"\x95" + struct.pack("<Q", end)
    return lambda path: path.write_bytes(b"\x80\4" + frame + content + b".") and None


def unlisted_storage(path: Path) -> None:
    """PyTorch leaves the memory of a storage that is not listed as it finds it."""
    parts = _pickles(_legacy())
    path.write_bytes(b"".join([*parts[:4], pickle.dumps([], 2)]))


def tar_header(path: Path) -> None:
    """Python before 3.13 looks through its content in quadratic time."""
    header = bytearray(_legacy()[:15].ljust(512, b"\0"))
    header[124:136], header[156:157], header[257:265] = b"%011o\0" % 2**21, b"x", b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(header + b"1" * 2**21 + bytes(1024))


def _beyond(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Changes a tensor of four elements: its offset, size and stride begin as K 0, K 4, K 1."""

    def write(path: Path) -> None:
        content = _pickle_in_a_zip(torch.zeros(4))
        assert old in content
        with_pickle(path, content.replace(old, new))

    return write


# Files that contradict themselves: [what writes them, words of the refusal].
CONTRADICTING: dict[str, tuple[Callable[[Path], None], str]] = {
    "nested root": (nested_root, "not one that torch.save makes"),
    "two tables": (two_tables, "more around it"),
    "many records": (many_records, "has 1000000 records"),
    "two encodings": (two_encodings, "names in an unknown encoding"),
    "a zero in a name": (zero_in_a_name, "names in an unknown encoding"),
    "two sizes": (two_sizes, "bytes of content"),
    "two types": (two_types, "two descriptions of one storage"),
    "a storage in a storage": (storage_in_a_storage, "a storage inside another one"),
    "other version": (other_version, "its version"),
    "end of a frame in a text": (_framed(b"X\4\0\0\0aaaa", 7), "only partly in a frame"),
    "a frame in a frame": (_framed(b"\x95" + bytes(8), 10), "a frame inside another one"),
    "unlisted storage": (unlisted_storage, "list of its storages"),
    "tar header": (tar_header, "damaged"),
    "offset": (_beyond(b"QK\0K\4", b"QK\2K\4"), "claims element 5 of a storage of 4"),
    "stride": (_beyond(b"K\1\x85", b"K\2\x85"), "claims element 6 of a storage of 4"),
}


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
