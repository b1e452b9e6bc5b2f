"""Check a .pt2 file of `torch.export` before PyTorch's own loader reads it.

The loader trusts its file. It unpickles tensors and other objects that the file calls pickled,
evaluates symbolic sizes and guards as Python, puts names into generated code, looks functions up
under ``torch.`` by any path (``torch.os.system``), and loads compiled libraries beside a program.
A program of ours needs none of this but plain tensors, arithmetic of sizes and known operators.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import torch

from elsa_core.runtime.errors import UsageError, one_line

COMPILED = "data/aotinductor/"  # files of AOTInductor, machine code among them
EXTRA = "extra/"
_MODEL, _SAMPLE = "models/model.json", "data/sample_inputs/model.pt"
_CONFIGS = {
    "data/weights/model_weights_config.json": r"weight_\d+",
    "data/constants/model_constants_config.json": r"tensor_\d+",
}
_NAMES = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|extra/\w+|archive_format|archive_version"
    r"|byteorder|\.data/\w+|" + "|".join(map(re.escape, (_MODEL, _SAMPLE, *_CONFIGS)))
)
_TARGETS = re.compile(
    r"torch\.ops\.(aten|elsa)\.\w+\.\w+|torch\.sym_\w+|math\.(ceil|floor|trunc)"
    r"|_operator\.(add|sub|mul|neg|floordiv|truediv|mod|pow|getitem|eq|ne|lt|le|gt|ge|and_|or_)"
)
_FORBIDDEN_TARGETS = re.compile(r"torch\.ops\.aten\.(from_file|_?save)\b.*")
# Texts that PyTorch evaluates, and what may stand in them.
_SYMPY = frozenset(
    "Symbol Integer Float Add Mul Pow Max Min Mod PythonMod FloorDiv CleanDiv CeilDiv CeilToInt "
    "FloorToInt TruncToInt IntTrueDiv FloatTrueDiv ToFloat ModularIndexing Where Equality "
    "Unequality GreaterThan LessThan StrictGreaterThan StrictLessThan And Or Not true false "
    "True False Rational Identity".split()
)
_GUARD_NAMES = frozenset(("L", "torch", "math", "max", "min"))
_GUARD_ATTRIBUTES = frozenset(("size", "stride", "storage_offset", "sym_max", "sym_min"))
_SYNTAX = (
    ast.Expression,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Attribute,
    ast.Subscript,
    ast.Constant,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Load,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)
_TREE_TYPES = ("builtins.tuple", "builtins.list", None)
_TEXT = re.compile(r"[\w.,;:@<>/+ -]*")
_NAME = re.compile(r"[\w.]*")


def read_names(content: io.BytesIO, path: str) -> tuple[Any, list[str]]:
    """Return PyTorch's reader of a .pt2 file and the names of the files in it.

    Raises UsageError if it is none.
    """
    try:
        reader = torch._C.PyTorchFileReader(content)
        names = reader.get_all_records()
    except RuntimeError as error:
        raise UsageError(f"{path} must be a .pt2 file: {one_line(error)[:200]}") from error
    if "archive_format" not in names:
        raise UsageError(f"{path} must be a .pt2 file of PyTorch 2.10 or later")
    return reader, names


def check_program(reader: Any, names: list[str], path: str) -> None:
    """Raises UsageError for a program whose loading or running may do more than compute."""
    for name in names:
        if not _NAMES.fullmatch(name) or names.count(name) > 1:
            _refuse(path, f"the file {name!r} in it")
    if _MODEL not in names:
        raise UsageError(f"{path} holds no exported program")
    for name, allowed in _CONFIGS.items():
        for entry in _read_json(reader, name, path)["config"].values():
            if entry["use_pickle"] or not re.fullmatch(allowed, entry["path_name"]):
                _refuse(path, "a pickled object")
    try:
        torch.load(io.BytesIO(reader.get_record(_SAMPLE)), weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} was refused, its example is no plain tensors") from error
    for key, text in _texts(_read_json(reader, _MODEL, path), ""):
        if not _is_harmless(key, text):
            _refuse(path, f"{key} {text[:60]!r}")


def _read_json(reader: Any, name: str, path: str) -> Any:
    try:
        return json.loads(reader.get_record(name))
    except (RuntimeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {name} in it is missing or damaged") from error


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in the JSON, with the key that it stands under; keys under "key"."""
    if isinstance(value, dict):
        for name, content in value.items():
            yield "key", name
            yield from _texts(content, name)
    elif isinstance(value, list):
        for content in value:
            yield from _texts(content, key)
    elif isinstance(value, str):
        yield key, value


def _is_harmless(key: str, text: str) -> bool:
    if key in ("target", "as_operator"):
        return bool(_TARGETS.fullmatch(text)) and not _FORBIDDEN_TARGETS.fullmatch(text)
    if key == "expr_str":
        return _is_arithmetic(text, _SYMPY, frozenset())
    if key == "guards_code":
        return _is_arithmetic(text, _GUARD_NAMES, _GUARD_ATTRIBUTES)
    if key in ("in_spec", "out_spec"):
        return _is_plain_tree(json.loads(text)[1])
    if key == "as_string":  # an operator's argument, which is only quoted
        return True
    if key in ("name", "as_name", "forward_arg_names", "key"):
        return bool(_NAME.fullmatch(text))
    return bool(_TEXT.fullmatch(text))


def _is_arithmetic(text: str, names: frozenset[str], attributes: frozenset[str]) -> bool:
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SYNTAX):
            return False
        if isinstance(node, ast.Name) and node.id not in names | {"oo", "int_oo"}:
            return False
        if isinstance(node, ast.Attribute) and node.attr not in attributes:
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if not _NAME.fullmatch(node.value):  # sympy evaluates the texts in a text, too
                return False
    return True


def _is_plain_tree(tree: Any) -> bool:
    if tree["type"] == "builtins.dict":
        keys = json.loads(tree["context"])
        plain = all(isinstance(key, str) for key in keys)
    else:
        plain = tree["type"] in _TREE_TYPES and tree["context"] in (None, "null")
    return plain and all(map(_is_plain_tree, tree["children_spec"]))


def _refuse(path: str, what: str) -> None:
    raise UsageError(f"{path} was refused, an exported program must be arithmetic alone: {what}")
