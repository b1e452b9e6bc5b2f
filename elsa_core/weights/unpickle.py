"""Read pickles without executing them: known data becomes inert stand-ins, the rest is refused."""

from __future__ import annotations

import math
import pickle
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from .opcodes import DICTS

# Data classes that training tools save in checkpoints. They are never imported.
DATA_CLASSES = {
    "addict.addict": {"Dict"},
    "argparse": {"Namespace"},
    "collections": {"Counter", "defaultdict", "deque"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "detectron2.config.config": {"CfgNode"},
    "easydict": {"EasyDict"},
    "fvcore.common.config": {"CfgNode"},
    "mmcv.utils.config": {"Config", "ConfigDict"},
    "mmengine.config.config": {"Config", "ConfigDict"},
    "mmengine.logging.history_buffer": {"HistoryBuffer"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "types": {"SimpleNamespace"},
    "yacs.config": {"CfgNode"},
    **{
        module: {
            *("bool", "dict", "float", "int", "list", "long", "object", "range", "str", "tuple"),
            *("Ellipsis", "NotImplemented", "unicode", "xrange"),
        }
        for module in ("builtins", "__builtin__")
    },
    "numpy": {
        *("bool", "bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64"),
        *("ndarray", "str_", "uint8", "uint16", "uint32", "uint64"),
    },
    "numpy.dtypes": {"Float64DType", "Float32DType", "Int64DType", "UInt32DType", "BoolDType"},
}
NUMPY_CORES = ("numpy.core", "numpy._core")
# numpy's codes of element types: [torch's type, code in the struct module].
ELEMENTS = {
    "f2": (torch.float16, "e"),
    "f4": (torch.float32, "f"),
    "f8": (torch.float64, "d"),
    "i1": (torch.int8, "b"),
    "i2": (torch.int16, "h"),
    "i4": (torch.int32, "i"),
    "i8": (torch.int64, "q"),
    "u1": (torch.uint8, "B"),
    "u2": (torch.uint16, "H"),
    "u4": (torch.uint32, "I"),
    "u8": (torch.uint64, "Q"),
    "b1": (torch.bool, "?"),
}


class UnsafePickle(pickle.UnpicklingError):
    """A pickle that imports something not known to be plain data."""


class StandIn(dict):
    """Stands for an object whose class is not imported: holds its parts, does nothing."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__()
        self.args = args

    def __new__(cls, *args: Any, **named: Any) -> StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    __hash__ = object.__hash__  # type: ignore[assignment]


class DType:
    """A numpy element type, as described in a pickle."""

    def __init__(self, code: Any, *_: Any) -> None:
        if isinstance(code, bytes):  # Python 2
            code = code.decode("latin1")
        if not isinstance(code, str) or len(code) > 16:
            raise pickle.UnpicklingError("a numpy element type is not described as it should be")
        self.code = code.lstrip("<=|")

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">":  # most significant byte first
            self.code = f">{self.code.lstrip('>')}"

    def lookup(self) -> tuple[torch.dtype, str]:
        if self.code not in ELEMENTS:
            raise pickle.UnpicklingError(f"numpy elements of type {self.code!r} are not supported")
        return ELEMENTS[self.code]


class Array:
    """A numpy array; ``tensor`` shares its values."""

    tensor: Tensor

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, raw = state
        self.tensor = tensor_of(raw, dtype, shape, "F" if column_major else "C")


def tensor_of(raw: Any, dtype: DType, shape: Any, order: str = "C") -> Tensor:
    """Return ``raw`` as a tensor. UnpicklingError if ``shape`` claims more elements than it has."""
    if isinstance(raw, str):  # Python 2
        raw = raw.encode("latin1")
    if not isinstance(raw, (bytes, bytearray)):
        raise pickle.UnpicklingError("arrays of Python objects are not supported")
    kind, _ = dtype.lookup()
    count = _product(shape)
    if count * kind.itemsize != len(raw):
        raise pickle.UnpicklingError(
            f"an array claims {count * kind.itemsize} bytes and has {len(raw)}"
        )
    if not count:
        return torch.empty(shape, dtype=kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes
        values = torch.frombuffer(raw, dtype=kind)
    if order == "C":
        return values.reshape(shape)
    return values.reshape(shape[::-1]).permute(*range(len(shape) - 1, -1, -1))


def _product(shape: Any) -> int:
    """Return the number of elements of a shape of at most 64 dimensions, each below 2^63."""
    if not isinstance(shape, (tuple, list, torch.Size)) or len(shape) > 64:
        raise pickle.UnpicklingError("a shape must be a tuple of at most 64 sizes")
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise pickle.UnpicklingError("a shape's sizes must be integers of at least 0, below 2^63")
    return math.prod(shape)


def _scalar(dtype: DType, raw: Any = b"") -> Any:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(raw, bytes):
        return StandIn()
    if dtype.code.startswith("U"):
        return raw.decode("utf-32-le").rstrip("\0")
    if dtype.code.startswith(("M", "S", "V")):  # times, bytes, records
        return StandIn()
    return struct.unpack("<" + dtype.lookup()[1], raw)[0]


def _frombuffer(raw: Any, dtype: DType, shape: Any, order: str, *_: Any) -> Array:
    array = Array()
    array.tensor = tensor_of(raw, dtype, shape, order)
    return array


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise UnsafePickle(f"the codec {encoding}")
    return text.encode("latin1")


def _bytearray(data: Any = b"", *encoding: Any) -> bytearray:
    if isinstance(data, str):
        data = _encode(data, *encoding)
    if not isinstance(data, (bytes, bytearray)):  # a number would be a size to allocate
        raise pickle.UnpicklingError("a byte array without its bytes")
    return bytearray(data)


def _getattr(owner: Any, name: str) -> StandIn:
    if not isinstance(name, str) or len(name) > 100:
        raise pickle.UnpicklingError("an attribute without a name")
    if not isinstance(owner, StandIn) and not (
        isinstance(owner, type) and issubclass(owner, StandIn)
    ):
        raise UnsafePickle(f"the attribute {name!r}")
    return StandIn()


def _reconstructor(kind: Any, *_: Any) -> StandIn:
    if not (isinstance(kind, type) and issubclass(kind, StandIn)):
        raise UnsafePickle("copyreg._reconstructor")
    return kind()


def _from_type(
    functions: Mapping[Any, Any], make: Any, _: Any, args: Any, state: Any = None
) -> Any:
    rebuilding = (known for (module, _), known in functions.items() if module == "torch._utils")
    if not any(make is known for known in rebuilding):
        raise UnsafePickle("a tensor made by another function")
    for attributes in state if isinstance(state, tuple) else (state,):
        if attributes is not None and type(attributes) is not dict:
            raise pickle.UnpicklingError("attributes of a tensor that are in no dict")
        for name in attributes or ():
            if not isinstance(name, str) or hasattr(Tensor, name):
                raise pickle.UnpicklingError(f"a tensor with the attribute {name!r:.100}")
    return make(*args)


def _functions() -> dict[tuple[str, str], Any]:
    """Return stand-ins for the functions that data is pickled with.

    Each pickle gets new ones, because it may set attributes on them.
    """
    functions: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): lambda *args: _encode(*args),
        ("torch", "Size"): torch.Size,
        ("torch", "device"): lambda *args: torch.device("cpu"),
        ("torch._utils", "_rebuild_tensor"): lambda *args: torch._utils._rebuild_tensor(*args),
        ("torch._utils", "_rebuild_tensor_v2"): lambda *args: torch._utils._rebuild_tensor_v2(
            *args[:6]
        ),
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        # FSDP saves tensors with attributes: function, class, arguments and state. The class is
        # named, never called.
        ("torch", "Tensor"): "torch.Tensor",
        ("torch._tensor", "_rebuild_from_type_v2"): lambda *args: _from_type(functions, *args),
        ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
        ("numpy", "dtype"): type("dtype", (DType,), {}),
    }
    for core in NUMPY_CORES:
        functions[f"{core}.multiarray", "scalar"] = lambda *args: _scalar(*args)
        functions[f"{core}.multiarray", "_reconstruct"] = lambda *_: Array()
        functions[f"{core}.numeric", "_frombuffer"] = lambda *args: _frombuffer(*args)
    for module in ("builtins", "__builtin__"):
        functions[module, "set"] = set
        functions[module, "frozenset"] = frozenset
        functions[module, "complex"] = complex
        functions[module, "slice"] = slice
        functions[module, "bytearray"] = lambda *args: _bytearray(*args)
        functions[module, "bytes"] = lambda *args: bytes(_bytearray(*args))
        functions[module, "getattr"] = lambda *args: _getattr(*args)
    for module in ("copyreg", "copy_reg"):
        functions[module, "_reconstructor"] = lambda *args: _reconstructor(*args)
    return functions


class DataUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing.

    Raises UnsafePickle with the name of the first class or function that is not known data.
    """

    def __init__(self, file: Any, **options: Any) -> None:
        super().__init__(file, **options)
        self.functions = _functions()
        self.known: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if (module, name) in self.functions:
            found = self.functions[module, name]
        elif module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        elif name in DATA_CLASSES.get(module, ()):
            found = type(name, (StandIn,), {})
        else:
            raise UnsafePickle(f"{module}.{name}")
        self.known[module, name] = found
        return found


def safe_globals(known: Iterable[tuple[str, str]]) -> list[Any]:
    """Return stand-ins for a pickle's imports, for `torch.serialization.safe_globals`.

    They are those of `DataUnpickler`, except that classes that hold items become dicts and lists:
    PyTorch fills no other containers.
    """
    functions = _functions()
    found: list[Any] = [(Array, f"{Array.__module__}.{Array.__name__}")]
    for module, name in known:
        if (module, name) in functions:
            stand_in = functions[module, name]
        elif name in DICTS:
            stand_in = OrderedDict
        else:
            stand_in = _ITEMS.get(name) or type(name, (StandIn,), {})
        if callable(stand_in):
            renamed = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            found += [(stand_in, ".".join(full)) for full in {(module, name), renamed}]
    return found


# Other classes of `DATA_CLASSES` that hold items.
_ITEMS: dict[str, Callable[..., Any]] = {
    "defaultdict": lambda *_: OrderedDict(),
    "deque": lambda *_: [],
}


class _StorageType:
    """A storage class."""

    def __init__(self, itemsize: int) -> None:
        self.itemsize = itemsize


class _Claim:
    """A storage or tensor of ``numel`` elements of ``itemsize`` bytes, not allocated."""

    __slots__ = ("itemsize", "numel")  # other attributes are refused, unlike on tensors

    def __init__(self, numel: int, itemsize: int) -> None:
        self.numel, self.itemsize = numel, itemsize


_KINDS = {
    name: _StorageType(size)
    for size, names in {
        1: ("Bool", "Byte", "Char", "QInt8", "QUInt8", "Untyped"),
        2: ("BFloat16", "Half", "Short"),
        4: ("Float", "Int", "QInt32", "ComplexHalf"),
        8: ("Double", "Long", "ComplexFloat"),
        16: ("ComplexDouble",),
    }.items()
    for name in names
}


class ClaimUnpickler(DataUnpickler):
    """Checks that tensors stay inside their storages, without allocating them.

    ``claims`` maps the key of each storage to the bytes that it claims.

    Raises UnsafePickle as `DataUnpickler`, and UnpicklingError if a tensor exceeds its storage.
    """

    def __init__(self, file: Any, **options: Any) -> None:
        super().__init__(file, **options)
        self.claims: dict[str, int] = {}
        self.kinds: dict[str, tuple[_StorageType, int]] = {}
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            self.functions["torch._utils", name] = lambda *args: _check_tensor(*args[:4])
        self.functions["torch._utils", "_rebuild_tensor_v3"] = lambda *args: _check_tensor(
            args[0], args[1], args[2], args[3], args[6]
        )

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
            if (kind := _KINDS.get(name.removesuffix("Storage"))) is None:
                raise UnsafePickle(f"{module}.{name}")
            return kind
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        # ("storage", kind, key, place, number of elements, [view]); anything else needs a module.
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage",):
            raise UnsafePickle("the source of a module")
        kind, key, numel = pid[1], pid[2], pid[4]
        described = isinstance(kind, _StorageType) and isinstance(key, str) and type(numel) is int
        described = described and key.isascii() and key.isprintable()
        if not described or not 0 <= numel < 2**63:
            raise pickle.UnpicklingError("a tensor's storage is not described as it should be")
        if len(pid) == 6 and pid[5] is not None:
            raise pickle.UnpicklingError("a storage inside another one, as PyTorch 0.1 had them")
        # PyTorch would use the first description, or leave memory uninitialised.
        if self.kinds.setdefault(key, (kind, numel)) != (kind, numel):
            raise pickle.UnpicklingError("two descriptions of one storage")
        self.claims[key] = numel * kind.itemsize
        return _Claim(numel, kind.itemsize)


def _check_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None
) -> _Claim:
    count = _product(size)
    if not isinstance(storage, _Claim) or len(stride) != len(size):
        raise pickle.UnpicklingError("a tensor is not described as it should be")
    _product((offset,))
    _product(stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    itemsize = storage.itemsize if dtype is None else dtype.itemsize
    room = storage.numel * storage.itemsize // itemsize
    if count > room:
        raise pickle.UnpicklingError(
            f"a tensor claims {count} elements of a storage of {room} (expanded ones are not read)"
        )
    if count and last >= room:
        raise pickle.UnpicklingError(f"a tensor claims element {last} of a storage of {room}")
    return _Claim(count, itemsize)
