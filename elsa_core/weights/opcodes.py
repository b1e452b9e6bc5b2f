"""Check the opcodes of a pickle before it is read, because unpicklers do not limit their resources.

A few bytes can request gigabytes of memory (a memo index), years of time (a tuple that holds
another one twice, sixty deep, as a dict key) or more stack than there is (nested tuples).
`PickleLook` follows the opcodes without creating the objects. It accepts only what picklers write,
so that all unpicklers agree on the result, and refuses what checkpoints do not have.

Source of the opcodes' meaning: `pickletools` of the standard library.
"""

from __future__ import annotations

import gc
import pickle
import pickletools
import sys
from collections import Counter, OrderedDict
from types import SimpleNamespace
from typing import Any

# Limit on the opcodes of all pickles of a file, weighted by their time, about ten microseconds a
# unit. A tensor takes 24 units, one with training state 90.
MAX_OPCODES = 400_000
_LIGHT, _CALL = 0.3, 3  # numbers, texts and the memo; function calls; all others weigh 1
_WEIGHTS = {"BINPUT": 0.4, "LONG_BINPUT": 0.4, "LONG1": 0.6, "LONG4": 0.6}
# Nesting depth of containers. Configs in checkpoints reach about 15.
MAX_DEPTH = 100
# Elements, counted once per reference, and elements that are hashed or passed to functions.
MAX_PARTS = 10_000_000
# Bytes of an integer. The magic number of files from before PyTorch 1.6 has 10.
MAX_INT_BYTES = 64
# Keys that may collide, times their elements, times the keys of their dict or set: each colliding
# key is compared with all others.
MAX_COMPARED = 100_000_000
# Bytes of one text or array, and extra bytes that all texts may take in memory: a character takes
# up to four.
MAX_TEXT = 2**27
MAX_WIDE = 2**29
# Bytes of text that functions may copy, in addition to twice the size of the file.
MAX_GIVEN = 64 * 2**20
_KEPT_TEXT = 200  # names of modules and attributes are shorter
# Classes of configs, which are dicts.
DICTS = {"CfgNode", "ConfigDict", "Dict", "EasyDict"}
# Classes that hash the elements of their argument, and classes that hash the first of each pair.
_HASHING = {"Counter", "set", "frozenset"}
_HASHING_PAIRS = {"OrderedDict", *DICTS}
# Classes that iterate over their argument, and classes whose objects take items and elements.
_ITERATING = {*_HASHING, *_HASHING_PAIRS, "Size", "defaultdict", "deque"}
_TAKING_ITEMS = {"OrderedDict", "Counter", "defaultdict", *DICTS}
_TAKING_ELEMENTS = {"deque"}

_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
_TEXTS = {
    *("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_PUTS = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"BINGET", "LONG_BINGET"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LIST, _DICT, _SET, _TUPLE, _TEXT, _GLOBAL, _MADE = range(7)  # kinds of objects
_CONTAINERS = {"EMPTY_LIST": _LIST, "EMPTY_DICT": _DICT, "EMPTY_SET": _SET, "EMPTY_TUPLE": _TUPLE}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Opcodes of protocol 2 that `torch.load(weights_only=True)` reads.
_OF_PYTORCH = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID", "TUPLE"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINFLOAT", "LONG1", "BININT", "BININT1"),
    *("BININT2", "BINUNICODE", "SHORT_BINSTRING", "BINPUT", "LONG_BINPUT"),
    *_GETS, *_CONSTANTS, *_CONTAINERS, *_TUPLES,
}  # fmt: skip
# Opcodes that Python's picklers write from protocol 2 on.
_OF_PYTHON = _OF_PYTORCH - {"BINPERSID"} | _NUMBERS | _TEXTS | _PUTS
_OF_PYTHON |= {"ADDITEMS", "FRAME", "FROZENSET", "STACK_GLOBAL"}
_MARK = object()


class _Object:
    """What the opcodes tell about an object that unpickling would create."""

    __slots__ = ("depth", "items", "keys", "kind", "name", "parts", "placed", "size")

    def __init__(self, kind: int, name: str = "", size: int = 0) -> None:
        self.kind = kind
        self.name = name  # of a class or function, or of the one that creates this object
        self.items: list[Any] = []  # numbers, short texts and other objects
        self.keys: list[Any] = []  # keys that have been set
        self.depth = self.parts = 1
        self.size = size  # bytes of a long text, or of the texts passed to a function
        self.placed = False  # whether another object holds it


class PickleLook:
    """Checks the pickles of one file; the limits apply to all of them together.

    Args:
        pytorch: whether `torch.load(weights_only=True)` reads the pickles, not `pickle`.
    """

    def __init__(self, *, pytorch: bool) -> None:
        self.allowed = _OF_PYTORCH if pytorch else _OF_PYTHON
        self.opcodes = 0.0
        self.read = self.wide = self.given = self.work = self.compared = 0

    def check(self, file: Any) -> None:
        """Read one pickle from a binary file, through its end, without unpickling it.

        Raises UnpicklingError if it exceeds a limit of this module, and as `pickletools` does if
        it is not a pickle.
        """
        collects = gc.isenabled()
        gc.disable()  # nothing here is garbage, and collection would take most of the time
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

        def read(count: int) -> bytes:
            if count > MAX_TEXT:
                raise _refusal(f"a text of {count} bytes")
            return file.read(count)

        source = SimpleNamespace(read=read, readline=file.readline)
        if "FRAME" in self.allowed:  # pickletools calls it for every opcode
            source.tell = file.tell
        try:
            self._follow(source)
        finally:
            if collects:
                gc.enable()

    def _follow(self, file: Any) -> None:
        stack, memo, frame_end = self.stack, self.memo, 0
        value: Any
        place: Any
        for number, (opcode, value, place) in enumerate(pickletools.genops(file), 1):
            name = opcode.name
            self.opcodes += _WEIGHTS.get(name, _LIGHT)
            if name not in self.allowed:
                raise _refusal(f"the opcode {name}, which checkpoints do not have")
            if frame_end and place >= frame_end:
                # Python's unpickler forgets the rest of a frame whose end is inside an opcode.
                if place > frame_end:
                    raise _refusal("an opcode that is only partly in a frame")
                frame_end = 0
            if name in _NUMBERS:
                if type(value) is int and value.bit_length() > 8 * MAX_INT_BYTES:
                    raise _refusal(f"an integer of {value.bit_length() // 8 + 1} bytes")
                stack.append(value)
            elif name in _TEXTS:
                long = len(value) > _KEPT_TEXT
                self.read += len(value)
                if long:
                    self.wide += sys.getsizeof(value) - len(value)
                    if self.wide > MAX_WIDE:
                        raise _refusal("texts of wide letters")
                stack.append(_Object(_TEXT, size=len(value)) if long else value)
            elif name in _PUTS:
                index = len(memo) if name == "MEMOIZE" else value
                if not 0 <= index <= number:
                    raise _refusal(f"{index} places of memory at its opcode {number}")
                memo[index] = stack[-1]
            elif name in _GETS:
                stack.append(memo[value])
            elif name == "FRAME":
                if frame_end:
                    raise _refusal("a frame inside another one")
                frame_end = place + 9 + value
            else:
                self.opcodes += 1 - _LIGHT
                self._make(name, value)
            if self.opcodes > MAX_OPCODES:
                raise _refusal(f"more than {MAX_OPCODES} opcodes")

    def _make(self, name: str, value: Any) -> None:
        """Follow an opcode that creates an object from others on the stack."""
        stack = self.stack
        if name == "MARK":
            stack.append(_MARK)
        elif name in _CONTAINERS:
            stack.append(_Object(_CONTAINERS[name]))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "GLOBAL":
            stack.append(_Object(_GLOBAL, value.rpartition(" ")[2]))
        elif name == "STACK_GLOBAL":
            last = stack.pop()
            stack[-1] = _Object(_GLOBAL, last if isinstance(last, str) else "")
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(stack) < count:
                raise IndexError("an opcode finds too few objects")
            stack[-count:] = [self._hold(_Object(_TUPLE), stack[-count:])]
        elif name == "TUPLE":
            items = self._to_mark()
            stack.append(self._hold(_Object(_TUPLE), items))
        elif name == "FROZENSET":
            items = self._to_mark()
            stack.append(self._hold(_Object(_SET), items))
            self._hash(items)
        elif name == "ADDITEMS":
            items = self._to_mark()
            holder = self._last(_SET)
            self._hash(items, len(holder.items))
            self._hold(holder, items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._to_mark()
            self._hold(self._last(_LIST, _TAKING_ELEMENTS), items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name != "SETITEM" else [stack.pop(), stack.pop()][::-1]
            holder = self._last(_DICT, _TAKING_ITEMS)
            self._hold(holder, items)
            self._hash(items[::2], len(holder.keys))
            holder.keys += items[::2]
        elif name == "BUILD":
            state = stack.pop()
            holder = self._last(_MADE)
            if not holder.name or holder.name.startswith("_rebuild"):
                raise _refusal("a tensor that is changed after it was made")
            if state is not holder:  # addict's dicts are their own state
                self._check_attributes(holder, state)
                self._give([state])
                self._hold(holder, [state])
        elif name == "BINPERSID":
            self._spend(stack[-1:])
            stack[-1] = self._hold(_Object(_MADE), stack[-1:])
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(self._call(stack.pop(), arguments, new=name == "NEWOBJ"))
        elif name not in ("PROTO", "STOP"):
            raise AssertionError(name)

    def _to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise IndexError("an opcode finds no mark")

    def _last(self, kind: int, makers: set[str] | None = None) -> _Object:
        """Return the object on top of the stack, which an opcode changes.

        Args:
            makers: names of classes whose objects are allowed, too.
        """
        last = self.stack[-1]
        if isinstance(last, _Object):
            if last.kind == kind or (makers and last.kind == _MADE and last.name in makers):
                return last
        raise _refusal("items of an object that has none")

    def _hold(self, holder: _Object, items: list[Any]) -> _Object:
        """Add elements to ``holder``, which nothing may hold yet: so no object can hold itself."""
        if holder.placed:
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

    def _call(self, function: Any, arguments: Any, new: bool) -> _Object:
        """Return the object that a class or function creates from a tuple of arguments.

        Args:
            new: whether only ``__new__`` is called, in which dicts ignore their arguments.
        """
        if not isinstance(function, _Object) or function.kind != _GLOBAL:
            raise _refusal("a call of what is no class or function")
        if not isinstance(arguments, _Object) or arguments.kind != _TUPLE:
            raise _refusal("a call without a tuple of arguments")
        name = function.name
        copied = self._give([arguments])
        made = self._hold(_Object(_MADE, name, copied), [arguments])
        if name in _ITERATING and not (new and name in _HASHING_PAIRS):
            objects = [one for one in arguments.items if isinstance(one, _Object)]
            if any(one.kind in (_TEXT, _MADE) for one in objects):
                raise _refusal(f"a {name} of what is no list, tuple, dict or set")
            for one in objects:
                elements = one.keys if one.kind == _DICT else one.items
                if name == "Size" and any(type(element) is not int for element in elements):
                    raise _refusal("a shape of other things than numbers")
                if name in _HASHING:
                    self._hash(elements)
                elif name in _HASHING_PAIRS:
                    self._hash(elements if one.kind == _DICT else [_first(e) for e in elements])
        return made

    def _check_attributes(self, holder: _Object, state: Any) -> None:
        """Check that attributes have short names, and that those of a dict hide no methods."""
        states = state.items if isinstance(state, _Object) and state.kind == _TUPLE else [state]
        for one in states:
            keys = one.keys if isinstance(one, _Object) else []
            if not all(isinstance(key, str) for key in keys):
                raise _refusal("an attribute without a name")
            if holder.name in _TAKING_ITEMS:
                if one is not None and getattr(one, "kind", None) != _DICT:
                    raise _refusal("attributes of a dict that are in no dict")
                for key in keys:
                    if hasattr(OrderedDict, key) or hasattr(Counter, key):
                        raise _refusal(f"a dict with the attribute {key!r}")

    def _give(self, items: list[Any]) -> int:
        """Count what a function gets, which may read all elements and copy all texts. Return the
        bytes of the texts."""
        self._spend(items)
        self.opcodes += _CALL - 1
        objects = [item for item in items if isinstance(item, _Object)]
        objects += [part for item in objects for part in item.items if isinstance(part, _Object)]
        copied = sum(item.size for item in objects)
        self.given += copied
        if self.given > 2 * self.read + MAX_GIVEN:
            raise _refusal(f"{self.given} bytes of text that are given to functions")
        return copied

    def _spend(self, items: list[Any]) -> None:
        self.work += sum(item.parts for item in items if isinstance(item, _Object))
        if self.work > MAX_PARTS:
            raise _refusal(f"more than {MAX_PARTS} elements that are hashed or given to functions")

    def _hash(self, keys: list[Any], before: int = 0) -> None:
        """Count the keys of a dict, or elements of a set, that has ``before`` others.

        Texts cannot be crafted to collide, and numbers in order do not.
        """
        self._spend(keys)
        self.work += 4 * len(keys)  # a set takes four times what a list does
        count = before + len(keys)
        for place, key in enumerate(keys, before):
            if isinstance(key, _Object):
                self.compared += count * key.parts
            elif type(key) is float or (type(key) is int and not 0 <= key <= place + 64):
                self.compared += count
        if self.compared > MAX_COMPARED:
            raise _refusal(f"{count} keys that may have to be compared with each other")


def _first(pair: Any) -> Any:
    if not isinstance(pair, _Object) or pair.kind not in (_LIST, _TUPLE) or len(pair.items) != 2:
        raise _refusal("a dict of what is no pair")
    return pair.items[0]


def _refusal(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"it asks for {what}")
