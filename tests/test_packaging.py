"""What is built and installed: files, metadata, and what happens without torch or a compiler."""

import ctypes
import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import elsa_core

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("elsa_core", "elsa_d2", "elsa_mm")
PROBE = 'extern "C" __attribute__((visibility("default"))) int elsa_probe() { return 7; }\n'


@pytest.fixture
def tree(tmp_path):
    """A copy of what packaging reads, with a one-line source in place of csrc."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "README.md").write_text("# ELSA-Swin\n")
    no_caches = shutil.ignore_patterns("__pycache__")
    for name in (*PACKAGES, "tests", "tools", "demo"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=no_caches)
    (tree / "elsa_core" / "_C.so").write_text("left by an earlier build")
    (tree / "csrc").mkdir()
    (tree / "csrc" / "probe.cpp").write_text(PROBE)
    return tree


def run_setup(tree, *arguments, code=None, **variables):
    """Run setup.py as pip does without build isolation."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ELSA_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ["-c", code] if code else ["setup.py"]
    return subprocess.run(
        [sys.executable, *script, *arguments],
        cwd=tree,
        env=environment | variables,
        text=True,
        capture_output=True,
    )


def built_wheel(tree):
    (path,) = (tree / "dist").glob("*.whl")
    return path


def python_files():
    files = {
        p.relative_to(ROOT).as_posix() for name in PACKAGES for p in ROOT.glob(f"{name}/**/*.py")
    }
    return files | {"elsa_core/py.typed"}


def package_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_without_extension_is_pure_python(tree):
    result = run_setup(tree, "bdist_wheel", ELSA_BUILD_EXTENSION="0")
    assert result.returncode == 0, result.stderr
    wheel = built_wheel(tree)
    assert wheel.name == f"elsa_swin-{elsa_core.__version__}-py3-none-any.whl"
    assert package_files(wheel) == python_files()
    assert result.stderr.count("the compiled operator is left out") == 1


def test_wheel_with_extension_serves_every_python(tree, tmp_path):
    result = run_setup(tree, "bdist_wheel")
    assert result.returncode == 0, result.stderr
    wheel = built_wheel(tree)
    assert wheel.name.startswith(f"elsa_swin-{elsa_core.__version__}-cp310-abi3-")
    assert package_files(wheel) == python_files() | {"elsa_core/_C.so"}
    with zipfile.ZipFile(wheel) as archive:
        library = ctypes.CDLL(archive.extract("elsa_core/_C.so", tmp_path))
    assert library.elsa_probe() == 7


def test_metadata_replaces_nobodys_torch_or_framework(tree):
    assert run_setup(tree, "bdist_wheel", ELSA_BUILD_EXTENSION="0").returncode == 0
    with zipfile.ZipFile(built_wheel(tree)) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    requirements = metadata.get_all("Requires-Dist")
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.4"]
    assert set(metadata.get_all("Provides-Extra")) == {"d2", "mm", "dev"}
    adapters = [line for line in requirements if "extra ==" in line and '"dev"' not in line]
    owned_by_user = ("torch", "detectron", "sal-", "mm", "onedl", "opencv", "numpy", "setuptools")
    assert adapters and not [line for line in adapters if line.startswith(owned_by_user)]
    assert metadata["Requires-Python"] == ">=3.10"


def test_build_without_torch_says_what_to_do(tree):
    code = "import sys; sys.modules['torch'] = None; exec(open('setup.py').read())"
    result = run_setup(tree, "bdist_wheel", code="__file__ = 'setup.py'; " + code)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "install torch first, then run 'pip install --no-build-isolation .'" in result.stderr


def test_build_without_compiler_leaves_the_extension_out(tree):
    result = run_setup(tree, "bdist_wheel", CC="/none/cc", CXX="/none/c++")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("no C++ compiler found (/none/c++)") == 1
    assert built_wheel(tree).name.endswith("-py3-none-any.whl")


def test_compile_error_is_not_swallowed(tree):
    (tree / "csrc" / "probe.cpp").write_text("#error this cannot be compiled\n")
    result = run_setup(tree, "bdist_wheel")
    assert result.returncode != 0
    assert "this cannot be compiled" in result.stdout + result.stderr
    assert not (tree / "dist").exists()


def test_extension_needs_no_python():
    binary = Path(elsa_core.__file__).parent / "_C.so"
    if not binary.exists():
        pytest.skip("elsa_core is installed without its extension")
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", binary], text=True)
    assert not [line for line in symbols.splitlines() if line.split()[-1].startswith(("Py", "_Py"))]


def test_pre_commit_runs_the_tools_of_the_environment():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    tools = {hook["entry"].split()[0] for hook in hooks if hook["language"] == "system"}
    assert tools == {".venv/bin/ruff", ".venv/bin/clang-format", ".venv/bin/mypy"}
    pinned = (ROOT / "requirements.txt").read_text()
    assert all(f"\n{Path(tool).name}==" in pinned for tool in tools)
