"""ELSA-Swin and ELSA-VOLO with torch as the only dependency: the operator and the backbones."""

from . import _requirements as _requirements
from . import detection as detection  # registers operators
from .backbone import ELSASwin
from .backends import backend_of, use_backend
from .operator import elsa_attention
from .reference import elsa_attention_reference
from .variants import VARIANTS, VOLO_VARIANTS
from .volo import ELSAVolo
from .volo_classifier import ELSAVoloClassifier, ELSAVoloTokens

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "VOLO_VARIANTS",
    "ELSASwin",
    "ELSAVolo",
    "ELSAVoloClassifier",
    "ELSAVoloTokens",
    "backend_of",
    "elsa_attention",
    "elsa_attention_reference",
    "use_backend",
]
