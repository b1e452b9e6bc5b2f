"""The doctor's report: what it names is there, and its self-check can fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from elsa_core import doctor
from elsa_core.operator import has_extension


def test_report_names_what_there_is(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 8 + len(doctor._devices())
    assert f"PyTorch {torch.__version__}" in out
    assert ("_C" in out) == has_extension
    assert "self-check cpu: operator and gradients right" in out
    assert "a small backbone right" in out


def test_command_line():
    def run(*arguments):
        command = [sys.executable, "-m", "elsa_core.doctor", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    shown = run("-h")
    assert shown.returncode == 0 and "Exit status" in shown.stdout
    refused = run("--all")
    assert refused.returncode == 2 and "--all" in refused.stderr


@pytest.mark.parametrize("what", ["result", "gradient", "NaN"])
@pytest.mark.parametrize("filters", [1, 2])
def test_wrong_kernels_are_found(what, filters, monkeypatch, capsys):
    """Of the published models, which have one ghost filter, and of others."""
    right = doctor.elsa_attention

    def wrong(value, logits, *ghosts, kernel_size):
        out = right(value, logits, *ghosts, kernel_size=kernel_size)
        if len(ghosts) != filters:
            return out
        if what == "result":
            return out * 1.01
        change = value - value.detach()
        return out + (0.01 if what == "gradient" else float("nan")) * change

    monkeypatch.setattr(doctor, "elsa_attention", wrong)
    assert doctor.main([]) == 1
    assert "operator and gradients WRONG" in capsys.readouterr().out


def test_a_wrong_backbone_is_found(monkeypatch, capsys):
    class Wrong(doctor.ELSASwin):
        def forward(self, x):
            return tuple(
                out * (1.1 if out.dtype == torch.float32 else 1) for out in super().forward(x)
            )

    monkeypatch.setattr(doctor, "ELSASwin", Wrong)
    assert doctor.main([]) == 1
    assert "operator and gradients right" in (out := capsys.readouterr().out)
    assert "a small backbone WRONG" in out


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
        [sys.executable, "-m", "elsa_core.doctor"],
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


def test_frameworks_are_named_under_any_distribution(monkeypatch):
    def version(name):
        if name == "onedl-mmcv":
            return "9.9"
        raise doctor.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.metadata, "version", version)
    lines, _ = doctor.report()
    assert "frameworks: mmcv 9.9" in lines
