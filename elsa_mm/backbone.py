"""The backbone as an MMEngine module, for every OpenMMLab toolbox."""

from __future__ import annotations

from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS

from elsa_core import ELSASwin as CoreELSASwin


# The root registry: MMDetection, MMSegmentation and MMPretrain all look there last.
@MODELS.register_module()
class ELSASwin(CoreELSASwin, BaseModule):
    """`elsa_core.ELSASwin` that takes OpenMMLab's ``init_cfg``.

    All other arguments, the feature maps and the parameter names are those of `elsa_core`. Without
    ``init_cfg``, `init_weights` keeps the initialisation that the constructor has made. Pretrained
    weights of a whole detector or segmentor need its prefix:
    ``dict(type="Pretrained", checkpoint=..., prefix="backbone.")``.
    """

    def __init__(
        self, *args: Any, init_cfg: dict | list[dict] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.init_cfg = init_cfg
