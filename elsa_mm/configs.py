"""Finds the configs for OpenMMLab."""

from __future__ import annotations

from pathlib import Path

from elsa_core.runtime.configs import find_config

_PACKAGE = Path(__file__).resolve().parent


def get_config_file(name: str) -> str:
    """The path of a config for ``Config.fromfile`` or as a ``_base_``.

    Args:
        name: such as "mmdet/elsa_swin/mask-rcnn_elsa-swin-t-p4-w7_fpn_amp-ms-crop-1x_coco.py".

    Raises UsageError if it does not exist.
    """
    return find_config(name, _PACKAGE / ".mim/configs", _PACKAGE.parent / "configs")
