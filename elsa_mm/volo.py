"""ELSA-VOLO as MMEngine modules: a reconstruction, of which no official weights exist."""

from __future__ import annotations

from mmengine.registry import MODELS

from elsa_core import ELSAVolo as CoreELSAVolo
from elsa_core.volo_classifier import ELSAVoloTokens as CoreELSAVoloTokens

from .backbone import OpenMMLabBackbone


@MODELS.register_module()
class ELSAVolo(OpenMMLabBackbone, CoreELSAVolo):
    """`elsa_core.ELSAVolo` for dense prediction; see `OpenMMLabBackbone`.

    Maps an image [B, in_chans, H, W] to contiguous feature maps [B, C_i, H_i, W_i]. A feature
    pyramid (FPN) needs ``pyramid=True``.
    """


@MODELS.register_module()
class ELSAVoloTokens(OpenMMLabBackbone, CoreELSAVoloTokens):
    """`elsa_core.volo_classifier.ELSAVoloTokens` for MMPretrain; see `OpenMMLabBackbone`.

    Maps an image [B, in_chans, H, W] to the class token [B, D], the map of the patch tokens
    [B, D, H/16, W/16] and MixToken's box, which `elsa_mm.volo_head.VoloHead` takes.
    """
