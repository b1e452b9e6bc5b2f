"""Programs of `torch.export` in .pt2 files, which run with `torch` and `elsa_core` alone.

A file holds either the program, which any processor and GPU runs, or what AOTInductor compiled of
it for this kind of processor.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.symbol import SymT, free_symbol_is_type
from torch.utils._sympy.value_ranges import ValueRanges

from elsa_core.linear import linear
from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.runtime.files import replacing_by_name

from .archive import COMPILED, EXTRA, check_program, read_names
from .quiet import quiet

if TYPE_CHECKING:
    from .models import Exportable

__all__ = ["Program", "compile_program", "export_program", "load_program", "save_program"]

RECORD = "elsa"
_LOGGERS = ("torch.export", "torch.utils.cpp_extension")

COMPILED_EXAMPLE = 257, 481
"""Height and width of the images that `compile_program` traces.

AOTInductor takes the number of windows for 1 in all inputs where it is 1 in the example. The last
map of these, 9x16, has two by three.
"""


@dataclass(frozen=True)
class Program:
    """An exported model that has been loaded.

    Attributes:
        record: the text that was saved with it, see `elsa_tools.export.record`.
        compiled: whether it is AOTInductor's.
    """

    record: str
    compiled: bool
    function: Callable[..., Any]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run without gradients. Raises UsageError for sizes that the program does not serve."""
        try:
            with torch.no_grad():
                outputs = self.function(*inputs)
        except RuntimeError as error:
            if not str(error).startswith("Expected input"):
                raise
            shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
            raise UsageError(
                f"the exported model does not serve inputs of {shapes}: {one_line(error)[:150]}"
            ) from error
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def export_program(
    module: Exportable, example: tuple[Tensor, ...] | None = None
) -> ExportedProgram:
    """Export a module in evaluation mode, for images of any number and size.

    Args:
        example: inputs to trace; default: ``module.example()``.

    Raises:
        UsageError: PyTorch cannot export the module.
    """
    example = example or module.example()
    try:
        with torch.no_grad(), quiet(*_LOGGERS):
            program = torch.export.export(
                module.eval(), example, dynamic_shapes=module.dynamic_shapes()
            )
    except Exception as error:  # the tracer raises what it likes
        raise UsageError(f"PyTorch cannot export the model: {one_line(error)[:300]}") from error
    # The tracer takes it that no map has a side of 1; what it records does not depend on that.
    for symbol in program.range_constraints:
        if free_symbol_is_type(symbol, SymT.SIZE):
            program.range_constraints[symbol] = ValueRanges(1, int_oo)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def save_program(
    module: Exportable,
    path: str,
    record_json: str,
    check: Callable[[str], object] | None = None,
) -> None:
    """Write a module as a .pt2 file with its weights.

    Args:
        record_json: what the file says about itself; see `elsa_tools.export.record`.
        check: called with the path of the complete file before it gets its name. If it raises, the
            file at ``path`` does not change.

    Raises:
        UsageError: the module cannot be exported, or ``path`` cannot be written.
    """
    _check_name(path)
    program, content = export_program(module), io.BytesIO()
    with quiet(*_LOGGERS):
        torch.export.save(program, content, extra_files={RECORD: record_json})
    content.seek(0)
    check_program(*read_names(content, path), path)
    _write(content, path, check)


def compile_program(
    module: Exportable,
    path: str,
    record_json: str,
    check: Callable[[str], object] | None = None,
) -> None:
    """Like `save_program`, compiled by AOTInductor for this kind of processor. It takes minutes.

    Raises:
        UsageError: there is no C++ compiler, or compilation fails.
    """
    _check_name(path)
    _check_compiler()
    image, *others = module.example()
    image = image.new_zeros(*image.shape[:2], *COMPILED_EXAMPLE)
    program = export_program(module, (image, *others))
    if torch.backends.mkldnn.is_available():  # AOTInductor itself uses it for static sizes alone
        _fuse_linear(
            program.graph_module.graph,
            torch.ops.mkldnn._linear_pointwise.default,
            lambda gelu: (("gelu", [], "none") if gelu else ("none", [], ""), {}),
        )
    content = io.BytesIO()
    with quiet(*_LOGGERS):
        try:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=content,
                inductor_configs={
                    "aot_inductor.metadata": {RECORD: record_json},
                    # With it, the masks of a detector come out wrong.
                    "layout_optimization": False,
                },
            )
        except Exception as error:
            raise UsageError(f"AOTInductor cannot compile: {one_line(error)[:300]}") from error
    _write(content, path, check)


def load_program(path: str, compiled: bool = False) -> Program:
    """Load a .pt2 file. A program's content is checked first; see `elsa_tools.export.archive`.

    Args:
        compiled: load AOTInductor's machine code, too, which cannot be checked: only from files
            that you trust like a program.

    Raises:
        UsageError: it is no .pt2 file, has no record, is compiled and ``compiled`` is False, or is
            not what `save_program` writes.
    """
    try:
        with open(path, "rb") as file:
            content = io.BytesIO(file.read())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    reader, names = read_names(content, path)
    if any(name.startswith(COMPILED) for name in names):
        if not compiled:
            raise UsageError(
                f"{path} holds compiled code, which is run unchecked: allow it for files that you "
                "made yourself"
            )
        return _load_compiled(path, reader, names)
    check_program(reader, names, path)
    if EXTRA + RECORD not in names:
        raise UsageError(f"{path} must be a file of `elsa export`, it has no record")
    record = reader.get_record(EXTRA + RECORD).decode()
    content.seek(0)
    try:
        with quiet(*_LOGGERS):
            module = torch.export.load(content).module(check_guards=False)
    except Exception as error:  # a damaged file fails anywhere
        raise UsageError(f"{path} cannot be loaded: {one_line(error)[:200]}") from error
    _fuse_linear(module.graph, linear, lambda gelu: ((), {"gelu_after": gelu}))
    module.recompile()
    return Program(record, False, module)


def _load_compiled(path: str, reader: Any, names: list[str]) -> Program:
    record = None
    for name in names:
        if name.startswith(COMPILED) and name.endswith("_metadata.json"):
            record = json.loads(reader.get_record(name)).get(RECORD, record)
    if record is None:
        raise UsageError(f"{path} must be a file of `elsa export`, it has no record")
    try:
        with quiet(*_LOGGERS):
            return Program(record, True, torch._inductor.aoti_load_package(path))
    except RuntimeError as error:
        raise UsageError(f"{path} cannot be loaded: {one_line(error)[:200]}") from error


def _fuse_linear(graph: torch.fx.Graph, target: Any, options: Callable[[bool], Any]) -> None:
    """Put ``target`` for linear layers, with the GELU behind them where there is one.

    Args:
        options: whether there is a GELU -> further (args, kwargs) of ``target``.
    """
    gelu = torch.ops.aten.gelu.default
    for node in graph.nodes:
        if node.target != torch.ops.aten.linear.default:
            continue
        users = list(node.users)
        fused = (
            len(users) == 1
            and users[0].target == gelu
            and users[0].kwargs.get("approximate", "none") == "none"
        )
        bias = node.args[2] if len(node.args) > 2 else None
        more, kwargs = options(fused)
        node.target, node.args, node.kwargs = target, (*node.args[:2], bias, *more), kwargs
        if fused:
            users[0].replace_all_uses_with(node)
    graph.eliminate_dead_code()


def _write(content: io.BytesIO, path: str, check: Callable[[str], object] | None) -> None:
    """By Python: PyTorch's writer aborts the process on a full disk."""
    with replacing_by_name(path) as part:
        with open(part, "wb") as file:
            file.write(content.getbuffer())
        if check is not None:
            check(part)


def _check_name(path: str) -> None:
    if not path.endswith(".pt2"):
        raise UsageError(f"the name of a program must end in .pt2, got {path}")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"the folder {folder} of {path} does not exist")


def _check_compiler() -> None:
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        raise UsageError(
            "AOTInductor needs a C++ compiler, none was found: install g++, or set CXX"
        ) from error
