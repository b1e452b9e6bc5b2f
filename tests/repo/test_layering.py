"""Imports go one way: elsa_tools -> elsa_d2 | elsa_mm -> elsa_core, without circles."""

import ast
import graphlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPENMMLAB = ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain")
FRAMEWORKS = ("detectron2", "fvcore", *OPENMMLAB)
ADAPTERS = {"elsa_d2": "detectron2", "elsa_mm": "mmengine"}
LARGE = {
    "elsa_d2": "detectron2.data, detectron2.engine, detectron2.evaluation, detectron2.modeling",
    "elsa_mm": "mmengine.runner, mmengine.hooks, mmengine.model",
}
PACKAGES = ("elsa_core", *ADAPTERS, "elsa_tools")
# What a folder or a file of elsa_core may import besides torch; its users import these by name.
CORE = {
    "detection.py": {"torchvision"},
    "timm.py": {"timm"},
    "torchvision.py": {"torchvision"},
    "transformers.py": {"transformers"},
    "triton": {"triton"},
    "weights": {"tqdm"},
    "data": {"numpy", "PIL", "pycocotools", "cityscapesscripts"},
}
FORBIDDEN = {
    "elsa_d2": {*OPENMMLAB, "elsa_mm", "elsa_tools"},
    "elsa_mm": {"detectron2", "fvcore", "elsa_d2", "elsa_tools"},
}


def modules():
    """{name: path} of all files of our packages."""
    paths = [path for package in PACKAGES for path in sources(package)]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return dict(zip([name.removesuffix(".__init__") for name in names], paths, strict=True))


def imports(path):
    """(module, names taken from it, dots before it) of each import anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names], node.level


def imported_modules(name, path, known):
    """Those of `known` that a file imports anywhere, for `from package import module`, too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for module, members, level in imports(path):
        above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
        base = ".".join([*above, *filter(None, [module])])
        found |= {f"{base}.{member}" for member in members} & known or {base}
    return found & known - {name}


def imported_packages(path):
    """Top-level packages that a file imports anywhere; relative imports stay inside."""
    return {module.split(".")[0] for module, _, level in imports(path) if level == 0}


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


def test_no_file_imports_itself_by_way_of_others():
    files = modules()
    graph = {name: imported_modules(name, path, set(files)) for name, path in files.items()}
    assert "elsa_core.backbone" in graph["elsa_core"] and "elsa_core" in graph["elsa_mm.backbone"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_elsa_core_needs_torch_alone():
    files = sources("elsa_core")
    assert {"backbone.py", "layers.py", "operator.py", "read.py"} <= {file.name for file in files}
    for file in files:
        place = file.relative_to(ROOT / "elsa_core").parts[0]
        allowed = sys.stdlib_module_names | {"torch", "elsa_core"} | CORE.get(place, set())
        assert imported_packages(file) <= allowed, file


@pytest.mark.parametrize("package", FORBIDDEN)
def test_adapters_know_their_own_framework_only(package):
    for file in sources(package):
        assert not imported_packages(file) & FORBIDDEN[package], file


@pytest.mark.slow
def test_importing_elsa_core_is_lean():
    result = run(
        "import sys, torch\n"
        "torch_alone = set(sys.modules)\n"
        "import elsa_core\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - torch_alone}\n"
        f"assert not loaded & {set(FRAMEWORKS).union(*CORE.values())!r}, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert elsa_core.__version__\n"
        "assert elsa_core.ELSASwin and elsa_core.elsa_attention and elsa_core.VARIANTS\n"
        "assert elsa_core.elsa_attention_reference\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("package", [name for name in ADAPTERS if sources(name)])
def test_importing_an_adapter_initialises_no_cuda_and_changes_nothing(package):
    """Neither in the warnings' filters nor in the framework's modules, but for new entries."""
    if find_spec(ADAPTERS[package]) is None:
        pytest.skip(f"{ADAPTERS[package]} is not installed")
    result = run(
        f"import sys, {LARGE[package]}\n"
        f"modules = {{n: m for n, m in sys.modules.items() if n.split('.')[0] in {FRAMEWORKS}}}\n"
        "before = {name: dict(vars(module)) for name, module in modules.items()}\n"
        f"import torch, warnings, {package}, elsa_core.runtime.quiet as quiet\n"
        "changed = [f'{n}.{key}' for n, names in before.items() for key, value in names.items()\n"
        "           if getattr(modules[n], key, None) is not value]\n"
        "assert len(modules) > 30 and not changed, changed\n"
        "assert not torch.cuda.is_initialized()\n"
        "silenced = [f[1].pattern for f in warnings.filters if f[1] is not None]\n"
        "assert not set(silenced) & set(quiet.WARNINGS), silenced\n"
    )
    assert result.returncode == 0, result.stderr
