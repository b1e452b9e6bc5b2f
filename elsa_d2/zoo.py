"""Where the configs for Detectron2 are."""

from __future__ import annotations

from pathlib import Path

from elsa_core.runtime.configs import find_config

_PACKAGE = Path(__file__).resolve().parent


def get_config_file(name: str) -> str:
    """The path of a config for `load_config`.

    Args:
        name: such as "COCO-InstanceSegmentation/mask_rcnn_elsa_swin_t_fpn_1x.yaml".

    Raises UsageError for one that is not there.
    """
    return find_config(name, _PACKAGE / "configs", _PACKAGE.parent / "configs/detectron2")
