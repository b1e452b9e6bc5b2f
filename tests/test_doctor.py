"""The doctor's report: what it names is there, and its self-check can fail."""

import subprocess
import sys

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


def test_command_line():
    def run(*arguments):
        command = [sys.executable, "-m", "elsa_core.doctor", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    shown = run("-h")
    assert shown.returncode == 0 and "Exit status" in shown.stdout
    refused = run("--all")
    assert refused.returncode == 2 and "--all" in refused.stderr


@pytest.mark.parametrize("what", ["result", "gradient"])
def test_wrong_kernels_are_found(what, monkeypatch, capsys):
    right = doctor.elsa_attention

    def wrong(value, *others, kernel_size):
        out = right(value, *others, kernel_size=kernel_size)
        if what == "result":
            return out * 1.01
        return out + 0.01 * (value - value.detach())

    monkeypatch.setattr(doctor, "elsa_attention", wrong)
    assert doctor.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_frameworks_are_named_under_any_distribution(monkeypatch):
    def version(name):
        if name == "onedl-mmcv":
            return "9.9"
        raise doctor.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.metadata, "version", version)
    lines, _ = doctor.report()
    assert "frameworks: mmcv 9.9" in lines
