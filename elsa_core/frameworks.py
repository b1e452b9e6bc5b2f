"""The doctor's checks of the frameworks: their versions, and the backbones in each.

Only these checks import the frameworks; no other part of elsa_core does.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata

import torch
from torch import nn

from .runtime.errors import one_line
from .runtime.packages import DISTRIBUTIONS, is_missing
from .self_check import ARCHS, BACKBONE_TOLERANCE, check_backbones

# Distributions that provide a module. Only one of them may be installed.
PUBLISHED = {
    "detectron2": ("detectron2", "sal-detectron2"),
    "mmengine": ("mmengine", "mmengine-lite", "onedl-mmengine"),
    "mmcv": ("mmcv", "mmcv-lite", "mmcv-full", "onedl-mmcv"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
    "mmpretrain": ("mmpretrain", "onedl-mmpretrain"),
}
TOOLBOXES = ("mmdet", "mmseg", "mmpretrain")
# Beginnings of error messages, and the remedy. See docs/troubleshooting.md.
REMEDIES = {
    r"No module named 'pkg_resources'": "run pip install 'setuptools>=64,<81'",
    r"libGL": "run pip uninstall -y opencv-python; pip install opencv-python-headless",
    r"mmcv\._ext": "this mmcv has no compiled operators: build them with tools/build_mmcv.py",
    r"MMCV==.* incompatible": "build an mmcv of that range with tools/build_mmcv.py",
    r"torchvision::nms": "install the torchvision that belongs to this PyTorch",
}


class Report:
    """Lines for people, and faults: one sentence each, with the remedy."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.faults: list[str] = []


def versions() -> dict[str, str]:
    """Return the versions of the installed modules, from the first distribution found."""
    return {module: found[0][1] for module in PUBLISHED if (found := list(_distributions(module)))}


def check_frameworks(report: Report) -> None:
    """Build and run small backbones through the registries of Detectron2 and OpenMMLab."""
    known = versions()
    if not known and is_missing("detectron2") and is_missing("mmengine"):
        report.lines.append("frameworks: none, elsa_core needs none")
        return
    for module in PUBLISHED:
        if len(found := [name for name, _ in _distributions(module)]) > 1:
            report.faults.append(
                f"{' and '.join(found)} are installed, and both bring {module}: run "
                f"pip uninstall -y {' '.join(found)}, and install one of them again"
            )
    if not is_missing("detectron2"):
        _try(report, "detectron2", "elsa_d2", known, _build_in_detectron2)
    if not is_missing("mmengine"):
        _try(report, "mmengine", "elsa_mm", known, partial(_build_in_openmmlab, "mmengine"))
        if not is_missing("mmcv"):
            _check_mmcv(report, known)
        for module in TOOLBOXES:
            if not is_missing(module) and _import(report, module, known):
                _try(report, module, "elsa_mm", known, partial(_build_in_openmmlab, module))


def _check_mmcv(report: Report, known: dict[str, str]) -> None:
    name = _name("mmcv", known)
    try:
        importlib.import_module("mmcv.ops")
    except Exception as error:  # any, as an undefined symbol
        if getattr(error, "name", None) == "mmcv._ext" and is_missing("mmdet"):
            report.lines.append(f"{name}: without compiled operators, which MMDetection needs")
        else:
            report.faults.append(_fault(name, error))
    else:
        report.lines.append(f"{name}: its compiled operators load")


def _distributions(module: str) -> Iterator[tuple[str, str]]:
    for name in PUBLISHED[module]:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _import(report: Report, module: str, known: dict[str, str]) -> bool:
    """Import a module; a failure is a fault."""
    try:
        importlib.import_module(module)
    except Exception as error:  # any, from assertions on versions to undefined symbols
        report.faults.append(_fault(_name(module, known), error))
        return False
    return True


def _try(
    report: Report,
    module: str,
    adapter: str,
    known: dict[str, str],
    build: Callable[[str], nn.Module],
) -> None:
    name = _name(module, known)
    try:
        importlib.import_module(adapter)
        error = check_backbones(torch.device("cpu"), build)
    except Exception as failure:
        report.faults.append(_fault(f"{name} with {adapter}", failure))
        return
    right = error <= BACKBONE_TOLERANCE
    report.lines.append(
        f"{name} with {adapter}: small backbones {'right' if right else 'WRONG'} ({error:.0e})"
    )
    if not right:
        report.faults.append(f"{name} with {adapter} computes wrong backbones")


def _name(module: str, known: dict[str, str]) -> str:
    return f"{module} {known[module]}" if module in known else module


def _fault(what: str, error: Exception) -> str:
    sentence = f"{what} fails: {type(error).__name__}: {one_line(error)}"
    for pattern, remedy in REMEDIES.items():
        if re.search(pattern, sentence):
            return f"{sentence}: {remedy}"
    name = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
    if name in DISTRIBUTIONS:
        return f"{sentence}: run pip install {DISTRIBUTIONS[name]}"
    return f"{sentence} (docs/troubleshooting.md)"


def _build_in_detectron2(name: str) -> nn.Module:
    load_config = importlib.import_module("elsa_d2").load_config
    modeling = importlib.import_module("detectron2.modeling")
    cfg = load_config()
    family = name.replace("ELSA", "elsa_").lower()  # elsa_swin
    cfg.MODEL.BACKBONE.NAME = f"build_{family}_backbone"
    node = cfg.MODEL[family.upper()]
    node.ARCH = "custom"
    for key, value in ARCHS[name].items():
        node.CUSTOM_ARCH[key.upper()] = value
    return modeling.build_backbone(cfg)


def _build_in_openmmlab(module: str, name: str) -> nn.Module:
    models = importlib.import_module(f"{module}.registry").MODELS
    return models.build(dict(type=name, arch=ARCHS[name]))
