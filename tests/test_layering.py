"""Imports go one way: elsa_core knows no framework, and neither adapter knows the other's."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPENMMLAB = ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain")
ADAPTERS = {"elsa_d2": "detectron2", "elsa_mm": "mmengine"}
LARGE = {
    "elsa_d2": "detectron2.data, detectron2.engine, detectron2.evaluation, detectron2.modeling",
    "elsa_mm": "mmengine.runner, mmengine.hooks, mmengine.model",
}
# Files of elsa_core that their users import by name, each with the library that it adapts to.
DOORS = {f"{name}.py": name for name in ("timm", "torchvision", "transformers")}
FRAMEWORKS = ("detectron2", "fvcore", *OPENMMLAB)
FORBIDDEN = {"elsa_d2": {*OPENMMLAB, "elsa_mm"}, "elsa_mm": {"detectron2", "elsa_d2"}}


def imported_packages(path):
    """Top-level packages that a file imports anywhere; relative imports stay inside."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add(node.module.split(".")[0])
    return packages


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )


def test_the_scan_sees_every_form_of_import(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import a.b\nfrom c.d import e\nfrom . import f\nfrom .g import h\n"
        "def function():\n    import i as j, k\n"
    )
    assert imported_packages(file) == {"a", "c", "i", "k"}


def test_elsa_core_needs_torch_alone():
    files = sources("elsa_core")
    assert {"backbone.py", "layers.py", "operator.py"} <= {file.name for file in files}
    for file in files:
        allowed = sys.stdlib_module_names | {"torch", "elsa_core", DOORS.get(file.name)}
        assert imported_packages(file) <= allowed, file


def test_elsa_weights_needs_torch_alone_but_for_its_comparison_of_frameworks():
    files = sources("elsa_weights")
    assert {"read.py", "convert.py", "write.py"} <= {file.name for file in files}
    allowed = sys.stdlib_module_names | {"torch", "elsa_core", "elsa_weights"}
    verify = ROOT / "elsa_weights" / "verify"
    for file in files:
        if verify not in file.parents:
            assert imported_packages(file) <= allowed, file
    code = (
        "import sys, elsa_weights, elsa_weights.cli, elsa_weights.verify\n"
        f"assert not set(sys.modules) & {set(OPENMMLAB) | {'detectron2', 'elsa_d2', 'elsa_mm'}!r}\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", FORBIDDEN)
def test_adapters_know_their_own_framework_only(package):
    for file in sources(package):
        assert not imported_packages(file) & FORBIDDEN[package], file


def test_importing_elsa_core_is_lean():
    result = run(
        "import sys, torch\n"
        "torch_alone = set(sys.modules)\n"
        "import elsa_core\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - torch_alone}\n"
        f"assert not loaded & {set(OPENMMLAB) | {'detectron2', 'torchvision', 'numpy'}!r}, loaded\n"
        f"assert not loaded & {set(DOORS.values())!r}, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert elsa_core.__version__\n"
        "assert elsa_core.ELSASwin and elsa_core.elsa_attention and elsa_core.VARIANTS\n"
        "assert elsa_core.elsa_attention_reference\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", [name for name in ADAPTERS if sources(name)])
def test_importing_an_adapter_initialises_no_cuda_and_changes_nothing(package):
    """Neither in the warnings' filters nor in the framework's modules, but for new entries."""
    if find_spec(ADAPTERS[package]) is None:
        pytest.skip(f"{ADAPTERS[package]} is not installed")
    result = run(
        f"import sys, {LARGE[package]}\n"
        f"modules = {{n: m for n, m in sys.modules.items() if n.split('.')[0] in {FRAMEWORKS}}}\n"
        "before = {name: dict(vars(module)) for name, module in modules.items()}\n"
        f"import torch, warnings, {package}, elsa_core.quiet as quiet\n"
        "changed = [f'{n}.{key}' for n, names in before.items() for key, value in names.items()\n"
        "           if getattr(modules[n], key, None) is not value]\n"
        "assert len(modules) > 30 and not changed, changed\n"
        "assert not torch.cuda.is_initialized()\n"
        "silenced = [f[1].pattern for f in warnings.filters if f[1] is not None]\n"
        "assert not set(silenced) & set(quiet.WARNINGS), silenced\n"
    )
    assert result.returncode == 0, result.stderr
