"""Looks through the opcodes of a pickle before it is read, for what unpicklers do not bound.

A few bytes can ask for gigabytes (a memo index), for years (a tuple that holds another one twice,
sixty deep, as a key of a dict) or for more stack than there is (nested tuples). `PickleLook`
follows the opcodes without making any of the objects, and refuses what checkpoints do not have.

Source of the opcodes' meaning: `pickletools` of the standard library.
"""

from __future__ import annotations

import gc
import pickle
import pickletools
from types import SimpleNamespace
from typing import Any

# Opcodes of all pickles of a file, weighted by the time that they take, about ten microseconds for
# each unit. A tensor has 23 units, one in training 88.
MAX_OPCODES = 500_000
_LIGHT, _CALL = 0.3, 3  # numbers, texts and the memo; functions; others have the weight 1
# Containers inside each other. Configs in checkpoints have some 15.
MAX_DEPTH = 100
# Elements with each reference counted, and elements that are hashed or given to functions.
MAX_PARTS = 10_000_000
# Bytes of an integer: the number that begins files from before PyTorch 1.6 has 10.
MAX_INT_BYTES = 64
# Keys that can have equal hashes, times their elements: a dict compares each with all others.
MAX_COMPARED = 100_000_000
# Bytes of text that functions may copy, beside twice those that the file has.
MAX_GIVEN = 64 * 2**20
_SMALLEST_COLLIDING = 2**61 - 1  # sys.hash_info.modulus
_KEPT_TEXT = 200  # names of modules are shorter
# Classes of configs, which are dicts.
DICTS = {"CfgNode", "ConfigDict", "Dict", "EasyDict"}
# Classes that hash the elements of what they are given, and those that hash the first of each pair.
_HASHING = {"set", "frozenset"}
_HASHING_PAIRS = {"OrderedDict", "dict", "Counter", *DICTS}

_SCALARS = {
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_PUTS = {"BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"}
_GETS = {"BINGET", "LONG_BINGET", "GET"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARKED = {"LIST", "TUPLE", "FROZENSET"}
_MARK = object()


class _Object:
    """What is known of an object that would be made."""

    __slots__ = ("depth", "items", "name", "parts", "placed", "size")

    def __init__(self, name: str = "", size: int = 0) -> None:
        self.name = name  # of a class or function
        self.items: list[Any] = []  # numbers, short texts and other objects
        self.depth = self.parts = 1
        self.size = size  # bytes of a long text, or of those that a function got
        self.placed = False  # in another object


class PickleLook:
    """A look through the pickles of one file, whose limits are for all of them."""

    def __init__(self) -> None:
        self.opcodes = 0.0
        self.read = self.given = self.work = self.colliding = self.key_parts = 0

    def check(self, file: Any) -> None:
        """Reads one pickle from a binary file, up to and including its end; makes nothing of it.

        Raises UnpicklingError for what the constants of this module rule out, and as `pickletools`
        for what is no pickle.
        """
        collects = gc.isenabled()
        gc.disable()  # nothing here is garbage, and looking for it takes most of the time
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        try:
            # Without `tell`, which pickletools would call for every opcode.
            self._follow(SimpleNamespace(read=file.read, readline=file.readline))
        finally:
            if collects:
                gc.enable()

    def _follow(self, file: Any) -> None:
        stack, memo = self.stack, self.memo
        for number, (opcode, value, _) in enumerate(pickletools.genops(file), 1):
            name = opcode.name
            self.opcodes += _LIGHT
            if name in _SCALARS:
                stack.append(self._scalar(value))
            elif name in _PUTS:
                index = len(memo) if name == "MEMOIZE" else value
                if not 0 <= index <= number:
                    raise _refusal(f"{index} places of memory at its opcode {number}")
                memo[index] = stack[-1]
            elif name in _GETS:
                stack.append(memo[value])
            else:
                self.opcodes += 1 - _LIGHT
                self._make(name, value)
            if self.opcodes > MAX_OPCODES:
                raise _refusal(f"more than {MAX_OPCODES} opcodes")

    def _scalar(self, value: Any) -> Any:
        if type(value) is int:
            if value.bit_length() > 8 * MAX_INT_BYTES:
                raise _refusal(f"an integer of {value.bit_length() // 8 + 1} bytes")
        elif isinstance(value, (str, bytes)) and len(value) > _KEPT_TEXT:
            self.read += len(value)
            return _Object(size=len(value))
        return value

    def _make(self, name: str, value: Any) -> None:
        """The opcodes that make objects, of others on the stack."""
        stack = self.stack
        if name == "MARK":
            stack.append(_MARK)
        elif name in _CONTAINERS:
            stack.append(_Object())
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "BYTEARRAY8":
            stack.append(self._scalar(bytes(value)))
        elif name == "GLOBAL":
            stack.append(_Object(_last(value)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_Object(stack[-1] if isinstance(stack[-1], str) else "")]
        elif name in _TUPLES:
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
        elif name == "BUILD":
            state = stack.pop()
            if state is not stack[-1]:  # addict's dicts are their own state
                self._give([state])
                self._hold(stack[-1], [state])
        elif name == "BINPERSID":
            self._spend(stack[-1:])
            stack[-1] = self._hold(_Object(), stack[-1:])
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            count = 2 if name == "NEWOBJ_EX" else 1
            arguments = [stack.pop() for _ in range(count)]
            stack.append(self._call(stack.pop(), arguments))
        elif name == "INST":
            arguments = [self._hold(_Object(), self._to_mark())]
            stack.append(self._call(_Object(_last(value)), arguments))
        elif name == "OBJ":
            kind, *items = self._to_mark()
            stack.append(self._call(kind, [self._hold(_Object(), items)]))
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

    def _hold(self, holder: Any, items: list[Any]) -> _Object:
        """``holder`` gets elements, as long as nothing holds it: so nothing can hold itself."""
        if not isinstance(holder, _Object) or holder.placed:
            raise _refusal("an object that holds itself, or that is changed after its use")
        holder.items += items
        holder.parts += len(items)
        for item in items:
            if isinstance(item, _Object):
                if item is holder:
                    raise _refusal("an object that holds itself")
                item.placed = True
                holder.parts += item.parts
                holder.depth = max(holder.depth, item.depth + 1)
            elif item is _MARK:
                raise IndexError("an opcode finds a mark")
        if holder.depth > MAX_DEPTH:
            raise _refusal(f"objects inside each other, more than {MAX_DEPTH} deep")
        if holder.parts > MAX_PARTS:
            raise _refusal(f"objects of more than {MAX_PARTS} elements, each reference counted")
        return holder

    def _call(self, function: Any, arguments: list[Any]) -> _Object:
        """What a class or function would make of a tuple of arguments, and of one by name."""
        made = self._hold(_Object(size=self._give(arguments)), arguments)
        name = function.name if isinstance(function, _Object) else ""
        if name in _HASHING or name in _HASHING_PAIRS:
            elements = [e for one in arguments for arg in _items(one) for e in _items(arg)]
            if name in _HASHING_PAIRS:  # pairs, or what another dict holds
                elements += [_items(pair)[0] for pair in elements if _items(pair)]
            self._hash(elements)
            made.items = elements
        return made

    def _give(self, items: list[Any]) -> int:
        """To a function, which may look at all elements and copy texts; the bytes of those."""
        self._spend(items)
        self.opcodes += _CALL - 1
        direct = [*items, *(part for item in items for part in _items(item))]
        copied = sum(item.size for item in direct if isinstance(item, _Object))
        self.given += copied
        if self.given > 2 * self.read + MAX_GIVEN:
            raise _refusal(f"{self.given} bytes of text that are given to functions")
        return copied

    def _spend(self, items: list[Any]) -> None:
        self.work += sum(item.parts for item in items if isinstance(item, _Object))
        if self.work > MAX_PARTS:
            raise _refusal(f"more than {MAX_PARTS} elements that are hashed or given to functions")

    def _hash(self, keys: list[Any]) -> None:
        """Keys of a dict, or elements of a set. Numbers below 2^61 and texts cannot collide."""
        self._spend(keys)
        for key in keys:
            if isinstance(key, _Object):
                self.colliding += 1
                self.key_parts += key.parts
            elif type(key) is int and abs(key) >= _SMALLEST_COLLIDING:
                self.colliding += 1
                self.key_parts += 1
        if self.colliding * self.key_parts > MAX_COMPARED:
            raise _refusal(f"{self.colliding} keys that may have to be compared with each other")


def _last(name: str) -> str:
    """Of a module and a name."""
    return name.rpartition(" ")[2]


def _items(item: Any) -> list[Any]:
    return item.items if isinstance(item, _Object) else []


def _refusal(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"it asks for {what}")
