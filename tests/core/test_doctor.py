"""The doctor's report: what it names is there, and its self-check can fail."""

import os
import re
import shutil
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from elsa_core import _fallback, doctor, frameworks, self_check
from elsa_core.operator import has_extension


def test_report_names_what_there_is(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert f"elsa_core {doctor.__version__} in {Path(doctor.__file__).parent}, Python " in out
    assert f"PyTorch {torch.__version__}" in out
    assert ("_C" in out) == has_extension
    assert "; operator by cpu\n" in out
    for name in ("cpu", "torch"):
        line = (
            rf"^self-check cpu by {name}: operator and gradients right \(.* small backbones right"
        )
        assert re.search(line, out, re.MULTILINE)
    installed = [name for name in frameworks.PUBLISHED if find_spec(name)]
    for name, version in frameworks.versions().items():
        what = "its compiled operators load" if name == "mmcv" else "small backbones right"
        assert name in installed and re.search(f"^{name} {version}.*: {what}", out, re.MULTILINE)
    assert len(out.splitlines()) < 13 + len(installed) + 5 * torch.cuda.device_count()


def test_command_line(capsys):
    with pytest.raises(SystemExit, match="0"):
        doctor.main(["-h"])
    assert "Exit status" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--all"])
    assert "--all" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["result", "gradient", "NaN"])
@pytest.mark.parametrize("filters", [1, 2])
def test_wrong_kernels_are_found(what, filters, monkeypatch, capsys):
    """Of the published models, which have one ghost filter, and of others."""
    right = self_check.elsa_attention

    def wrong(value, logits, *ghosts, kernel_size):
        out = right(value, logits, *ghosts, kernel_size=kernel_size)
        if len(ghosts) != filters:
            return out
        if what == "result":
            return out * 1.01
        change = value - value.detach()
        return out + (0.01 if what == "gradient" else float("nan")) * change

    monkeypatch.setattr(self_check, "elsa_attention", wrong)
    assert doctor.main(["--core"]) == 1
    assert "operator and gradients WRONG" in capsys.readouterr().out


def test_every_back_end_is_checked(monkeypatch, capsys):
    right = _fallback.attention
    monkeypatch.setattr(_fallback, "attention", lambda *problem: 1.01 * right(*problem))
    assert doctor.main(["--core"]) == 1
    out = capsys.readouterr().out
    assert "self-check cpu by cpu: operator and gradients right" in out
    assert "WRONG: results of torch on cpu are wrong" in out


def test_a_back_end_that_fails_is_named(monkeypatch, capsys):
    def fail(*problem):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(_fallback, "attention", fail)
    assert doctor.main(["--core"]) == 1
    out = capsys.readouterr().out
    assert "self-check cpu by cpu: operator and gradients right" in out
    assert "WRONG: torch on cpu fails with 'no such instruction': set ELSA_BACKEND to" in out


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda out: out, None),
        (lambda out: 1.05 * out, "results of the grouped convolution on cpu are wrong"),
        (lambda out: out.missing, "the grouped convolution on cpu fails with .*missing"),
    ],
    ids=["right", "wrong", "fails"],
)
def test_grouped_convolution_is_checked(change, says, monkeypatch):
    """By PyTorch's convolution: only devices have kernels of their own."""
    right, report = torch.ops.elsa.grouped_conv, frameworks.Report()
    monkeypatch.setattr(
        torch.ops.elsa,
        "grouped_conv",
        lambda *tensors: (
            right(*tensors) if tensors[0].dtype == torch.double else change(right(*tensors))
        ),
    )
    doctor._check_convolution(report, torch.device("cpu"))
    assert len(report.faults) == (says is not None)
    if says:
        assert re.search(f"{says}.*ELSA_CONVOLUTION=torch", report.faults[0])
    else:
        assert (
            "grouped convolution and gradients right (relative errors: float16" in report.lines[0]
        )


@pytest.mark.parametrize("name", self_check.ARCHS)
def test_a_wrong_backbone_is_found(name, monkeypatch, capsys):
    class Wrong(getattr(self_check, name)):
        def forward(self, x):
            return tuple(
                out * (1.1 if out.dtype == torch.float32 else 1) for out in super().forward(x)
            )

    monkeypatch.setattr(self_check, name, Wrong)
    assert doctor.main(["--core"]) == 1
    assert "operator and gradients right" in (out := capsys.readouterr().out)
    assert "small backbones WRONG" in out


@pytest.mark.slow
@pytest.mark.skipif(not has_extension, reason="there is no compiled operator to take")
@pytest.mark.parametrize("same", [True, False], ids=["this version", "another version"])
def test_a_clone_takes_the_operator_that_was_installed_from_it(tmp_path, same):
    """Its folder comes first on the path, and has no binary."""
    source = Path(doctor.__file__).parent
    for place in ("clone", "site"):
        unwanted = ("__pycache__", "_C*") if place == "clone" else ("__pycache__",)
        ignored = shutil.ignore_patterns(*unwanted)
        shutil.copytree(source, tmp_path / place / "elsa_core", ignore=ignored)
    if not same:
        (tmp_path / "site/elsa_core/__init__.py").write_text("__version__ = '9'\n")
    done = subprocess.run(
        [sys.executable, "-m", "elsa_core.doctor", "--core"],
        cwd=tmp_path / "clone",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"in {tmp_path / 'clone/elsa_core'}" in done.stdout
    (binary,) = (tmp_path / "site/elsa_core").glob("_C*.so")
    taken = f"extension: {binary}, of another copy of elsa_core" in done.stdout
    assert taken == same and ("without its compiled operator" in done.stderr) != same


def faults(monkeypatch, broken=None, modules=frameworks.PUBLISHED):
    """What the doctor finds wrong in an environment in which only these modules are there.

    Args:
        broken: what importing a module raises, by its name.
    """

    def import_module(name):
        if name in (broken or {}):
            raise broken[name]
        return types.ModuleType(name)

    hidden = set(frameworks.PUBLISHED) - set(modules)
    monkeypatch.setattr(frameworks, "is_missing", lambda name: name in hidden)
    monkeypatch.setattr(frameworks.importlib, "import_module", import_module)
    monkeypatch.setattr(frameworks, "check_backbones", lambda device, build: 0.0)
    report = frameworks.Report()
    frameworks.check_frameworks(report)
    return report


BROKEN = {
    "OpenCV": (
        {"elsa_d2": ModuleNotFoundError("No module named 'cv2'", name="cv2")},
        "detectron2.* with elsa_d2 fails: .*: run pip install opencv-python-headless",
    ),
    "pycocotools": (
        {"mmdet": ModuleNotFoundError("No module named 'pycocotools'", name="pycocotools")},
        "mmdet.* fails: .*: run pip install pycocotools",
    ),
    "setuptools": (
        {"elsa_d2": ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources")},
        "elsa_d2 fails: .*: run pip install 'setuptools>=64,<81'",
    ),
    "libGL": (
        {"mmcv.ops": ImportError("libGL.so.1: cannot open shared object file")},
        "mmcv.* fails: ImportError: libGL.*pip install opencv-python-headless",
    ),
    "mmcv-lite": (
        {"mmcv.ops": ModuleNotFoundError("No module named 'mmcv._ext'", name="mmcv._ext")},
        "mmcv.* fails: .*: this mmcv has no compiled operators: build them with tools/build_mmcv",
    ),
    "a version of mmcv": (
        {"mmdet": AssertionError("MMCV==2.2.0 is used but incompatible. Please install mmcv>=2")},
        "mmdet.* fails: AssertionError: MMCV==2.2.0 .*: build an mmcv of that range with tools/",
    ),
    "torchvision": (
        {"elsa_d2": RuntimeError("operator torchvision::nms does not exist")},
        "elsa_d2 fails: RuntimeError: .*: install the torchvision that belongs to this PyTorch",
    ),
    "anything": (
        {"mmseg": TypeError("of two\nlines")},
        "mmseg.* of two lines .*troubleshooting.md",
    ),
}


@pytest.mark.parametrize("broken, sentence", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_with_a_framework(broken, sentence, monkeypatch):
    """The others are checked all the same."""
    report = faults(monkeypatch, broken)
    assert len(report.faults) == 1 and re.search(sentence, report.faults[0])
    assert "\n" not in report.faults[0] and len(report.lines) == len(frameworks.PUBLISHED) - 1


def test_mmcv_without_operators_is_wrong_for_mmdetection_alone(monkeypatch):
    broken, _ = BROKEN["mmcv-lite"]
    report = faults(monkeypatch, broken, modules=("mmengine", "mmcv", "mmseg"))
    assert not report.faults and "without compiled operators, which" in report.lines[1]


def test_no_framework_is_nothing_wrong(monkeypatch):
    monkeypatch.setattr(frameworks, "versions", dict)
    report = faults(monkeypatch, modules=())
    assert (report.lines, report.faults) == (["frameworks: none, elsa_core needs none"], [])


def test_distributions(monkeypatch):
    """Versions under any of their names, two under one import name, and a failed installation."""
    installed = {
        "onedl-mmcv": "9.9",
        "mmcv-lite": "8.8",
        "onedl-mmengine": "1.0",
        "UNKNOWN": "0.0.0",
    }

    def version(name):
        if name not in installed:
            raise frameworks.metadata.PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(frameworks.metadata, "version", version)
    assert frameworks.versions() == {"mmengine": "1.0", "mmcv": "8.8"}
    (found,) = faults(monkeypatch).faults
    assert found.startswith(
        "mmcv-lite and onedl-mmcv are installed, and both bring mmcv: run pip un"
    )
    report = doctor.examine(frameworks=False)
    assert len(report.faults) == 1 and "pip uninstall -y UNKNOWN" in report.faults[0]


def test_versions_out_of_range_and_optional_packages(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 15, 0))
    monkeypatch.setattr(doctor, "is_missing", lambda module: module in ("onnx", "skimage"))
    monkeypatch.setattr(doctor, "has_extension", False)
    monkeypatch.setattr(doctor.torch, "__version__", "2.9.1+cpu")
    report = doctor.examine(frameworks=False)
    assert report.faults == [
        "Python is outside the range 3.10 to 3.14 that is tested: use one in it"
    ]
    assert "extension: none, it needs PyTorch 2.10" in report.lines
    missing = "optional, not installed: scikit-image (tools/make_digits.py), onnx (ONNX)"
    assert report.lines[-1] == missing
