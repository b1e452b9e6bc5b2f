"""Looks through the opcodes of a pickle before it is read, for what unpicklers do not bound.

A few bytes can ask for gigabytes (a memo index), for years (a tuple that holds another one twice,
sixty deep, as a key of a dict) or for more stack than there is (nested tuples). `check_pickle`
follows the opcodes without making any of the objects, and refuses what checkpoints do not have.

Source of the opcodes' meaning: `pickletools` of the standard library.
"""

from __future__ import annotations

import gc
import pickle
import pickletools
from typing import Any

# Opcodes of one pickle, of some microseconds each. A tensor has 30, one in training 120.
MAX_OPCODES = 1_000_000
# Containers inside each other. Configs in checkpoints have some 15.
MAX_DEPTH = 100
# Elements with each reference counted, and elements that are hashed or given to functions.
MAX_PARTS = 10_000_000
# Bytes of an integer: the number that begins files from before PyTorch 1.6 has 10.
MAX_INT_BYTES = 64
# Integers that can have equal hashes, and keys other than numbers and text: a dict of them can
# take quadratic time.
MAX_COLLIDING = 1000
_SMALLEST_COLLIDING = 2**61 - 1  # sys.hash_info.modulus
_KEPT_TEXT = 200  # names of modules are shorter
_HASHING = {"set", "frozenset"}
_HASHING_PAIRS = {"OrderedDict", "dict", "Counter"}

_SCALARS = {
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE", "BYTEARRAY8"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARKED = {"LIST", "TUPLE", "FROZENSET"}
_MARK = object()


class _Object:
    """What is known of an object that would be made."""

    __slots__ = (
        *("compounds", "depth", "firsts", "keys", "leads", "name", "parts", "placed", "within"),
    )

    def __init__(self, name: str = "") -> None:
        self.name = name  # of a class or function
        self.depth = self.parts = 1
        self.placed = False  # in another object
        self.leads = False  # whether its first element is a compound: no number and no text
        self.compounds = 0  # its elements that are compounds
        self.within = 0  # the compounds of its elements
        self.firsts = 0  # its elements that lead with a compound
        self.keys = 0  # the elements of its elements that lead with a compound


def check_pickle(file: Any) -> None:
    """Reads one pickle from a binary file, up to and including its end, and makes nothing of it.

    Raises UnpicklingError for what the constants of this module rule out, and as `pickletools` for
    what is no pickle.
    """
    collects = gc.isenabled()
    gc.disable()  # nothing here is garbage, and looking for it takes most of the time
    try:
        _Look().follow(file)
    finally:
        if collects:
            gc.enable()


class _Look:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.work = self.colliding = 0

    def follow(self, file: Any) -> None:
        stack, memo = self.stack, self.memo
        for number, (opcode, value, _) in enumerate(pickletools.genops(file), 1):
            name = opcode.name
            if name in _SCALARS:
                stack.append(self._scalar(value))
            elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                index = len(memo) if name == "MEMOIZE" else value
                if not 0 <= index <= number:
                    raise _refusal(f"{index} places of memory at its opcode {number}")
                memo[index] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[value])
            elif name in _CONTAINERS:
                stack.append(_Object())
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name == "MARK":
                stack.append(_MARK)
            elif name in ("GLOBAL", "INST"):
                made = _Object(value.rpartition(" ")[2])
                if name == "INST":
                    self._call(made, self._to_mark())
                stack.append(made)
            else:
                self._combine(name)
            if number > MAX_OPCODES:
                raise _refusal(f"more than {MAX_OPCODES} opcodes")

    def _scalar(self, value: Any) -> Any:
        if type(value) is int:
            if abs(value) >= _SMALLEST_COLLIDING:
                if value.bit_length() > 8 * MAX_INT_BYTES:
                    raise _refusal(f"an integer of {value.bit_length() // 8 + 1} bytes")
                self._collide()
        elif isinstance(value, (str, bytes)) and len(value) > _KEPT_TEXT:
            return ""
        return value

    def _combine(self, name: str) -> None:
        """The opcodes that take objects from the stack."""
        stack = self.stack
        if name in _TUPLES:
            count = _TUPLES[name]
            if len(stack) < count:
                raise IndexError("an opcode finds too few objects")
            stack[-count:] = [self._hold(_Object(), stack[-count:])]
        elif name in _MARKED:
            items = self._to_mark()
            stack.append(self._hold(_Object(), items))
            if name == "FROZENSET":
                self._hash(items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._to_mark()
            self._hold(stack[-1], items)
            if name == "ADDITEMS":
                self._hash(items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = self._to_mark() if name != "SETITEM" else [stack.pop(), stack.pop()][::-1]
            if name == "DICT":
                stack.append(_Object())
            self._hold(stack[-1], items)
            self._hash(items[::2])
        elif name in ("REDUCE", "NEWOBJ", "BUILD"):
            items = [stack.pop()]
            called = stack[-1] if name == "BUILD" else stack.pop()
            made = called if name == "BUILD" else _Object()
            if name == "BUILD" and items[0] is called:  # addict's dicts are their own state
                return
            self._call(made, items, getattr(called, "name", ""))
            if name != "BUILD":
                stack.append(made)
        elif name == "NEWOBJ_EX":
            items = [stack.pop(), stack.pop(), stack.pop()]
            stack.append(self._call(_Object(), items))
        elif name == "OBJ":
            stack.append(self._call(_Object(), self._to_mark()))
        elif name == "STACK_GLOBAL":
            last = stack.pop()
            stack.pop()
            stack.append(_Object(last if isinstance(last, str) else ""))
        elif name == "BINPERSID":
            stack[-1] = self._call(_Object(), [stack[-1]])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise _refusal(f"the opcode {name}, which no checkpoint has")

    def _to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise IndexError("an opcode finds no mark")

    def _hold(self, holder: Any, items: list[Any]) -> Any:
        """``holder`` gets elements, as long as nothing holds it: so nothing can hold itself."""
        if not isinstance(holder, _Object) or holder.placed:
            raise _refusal("an object that holds itself, or that is changed after its use")
        if items and holder.parts == 1:
            holder.leads = isinstance(items[0], _Object)
        holder.parts += len(items)
        for item in items:
            if isinstance(item, _Object):
                if item is holder:
                    raise _refusal("an object that holds itself")
                item.placed = True
                holder.parts += item.parts
                holder.depth = max(holder.depth, item.depth + 1)
                holder.compounds += 1
                holder.within += item.compounds
                holder.keys += item.firsts
                holder.firsts += item.leads
            elif item is _MARK:
                raise IndexError("an opcode finds a mark")
        if holder.depth > MAX_DEPTH:
            raise _refusal(f"objects inside each other, more than {MAX_DEPTH} deep")
        if holder.parts > MAX_PARTS:
            raise _refusal(f"objects of more than {MAX_PARTS} elements, each reference counted")
        return holder

    def _call(self, made: _Object, items: list[Any], name: str = "") -> _Object:
        """An object that a class or function makes of arguments, or that gets its attributes."""
        self._spend(items)
        if name in _HASHING:
            self._collide(sum(item.within for item in items if isinstance(item, _Object)))
        elif name in _HASHING_PAIRS:
            self._collide(sum(item.keys for item in items if isinstance(item, _Object)))
        return self._hold(made, items)

    def _hash(self, keys: list[Any]) -> None:
        """Keys of a dict, or elements of a set."""
        self._spend(keys)
        self._collide(sum(isinstance(key, _Object) for key in keys))

    def _spend(self, items: list[Any]) -> None:
        self.work += sum(item.parts for item in items if isinstance(item, _Object))
        if self.work > MAX_PARTS:
            raise _refusal(f"more than {MAX_PARTS} elements that are hashed or given to functions")

    def _collide(self, count: int = 1) -> None:
        self.colliding += count
        if self.colliding > MAX_COLLIDING:
            raise _refusal(
                f"more than {MAX_COLLIDING} integers of over 60 bits or keys that are objects"
            )


def _refusal(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"it asks for {what}")
