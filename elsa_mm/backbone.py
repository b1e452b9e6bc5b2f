"""The backbones as MMEngine modules, for every OpenMMLab toolbox: what both families share."""

from __future__ import annotations

import os
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS
from torch import Tensor

from elsa_core import ELSASwin as CoreELSASwin
from elsa_core.backbone import StagedBackbone
from elsa_core.weights import load_backbone, report


class OpenMMLabBackbone(StagedBackbone, BaseModule):
    """Base of the adapters: a backbone of `elsa_core` that takes OpenMMLab's ``init_cfg``.

    All other arguments, the feature maps and the parameter names are those of `elsa_core`. Without
    ``init_cfg``, `init_weights` keeps the weights of the constructor.

    ``dict(type="Pretrained", checkpoint=...)`` takes every local file that `elsa_core.weights` can
    convert, without a prefix and without executing anything in the file.
    """

    def __init__(
        self, *args: Any, init_cfg: dict | list[dict] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.init_cfg = init_cfg

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return contiguous outputs.

        `elsa_core` returns channels-last views. Convolutions keep their strides, and mmcv's
        RoIAlign reads such maps as if they were contiguous, without an error.
        """
        return tuple(output.contiguous() for output in super().forward(x))

    def init_weights(self) -> None:
        """As BaseModule. Raises UsageError for a missing file and for another backbone."""
        configs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
        files = [config for config in configs if _is_local_pretrained(config)]
        if self.is_init or not files:
            super().init_weights()
            return
        kept, self.init_cfg = self.init_cfg, [c for c in configs if c not in files]
        super().init_weights()
        self.init_cfg = kept
        for config in files:
            conversion = load_backbone(self, os.path.expanduser(config["checkpoint"]))
            print_log(f"{config['checkpoint']}: {report.text(conversion)}", logger="current")


# In MMEngine's root registry, where MMDetection, MMSegmentation and MMPretrain find it.
@MODELS.register_module()
class ELSASwin(OpenMMLabBackbone, CoreELSASwin):
    """`elsa_core.ELSASwin`; see `OpenMMLabBackbone`.

    Maps an image [B, in_chans, H, W] to contiguous feature maps [B, C_i, H_i, W_i].
    """


def _is_local_pretrained(config: dict[str, Any]) -> bool:
    """Whether it names a file, not an address such as "https://..." or "torchvision://..."."""
    if config.get("type") not in ("Pretrained", PretrainedInit):
        return False
    path = os.path.expanduser(config["checkpoint"])
    return os.path.isfile(path) or ":" not in path
