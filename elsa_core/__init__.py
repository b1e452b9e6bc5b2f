"""ELSA-Swin with torch as the only dependency: the operator and the backbone."""

from . import _requirements as _requirements
from . import detection as detection  # registers operators
from .backbone import ELSASwin
from .backends import backend_of, use_backend
from .operator import elsa_attention
from .reference import elsa_attention_reference
from .variants import VARIANTS

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "ELSASwin",
    "backend_of",
    "elsa_attention",
    "elsa_attention_reference",
    "use_backend",
]
