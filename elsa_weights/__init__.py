"""Weights of ELSA-Swin models: read safely, recognised, and moved between the frameworks.

torch is the only dependency; `elsa_weights.verify` imports the frameworks that it compares.
"""

from .convert import TARGETS, Conversion, convert
from .files import convert_file, load_backbone, tensors_for
from .read import check_checkpoint, read_checkpoint
from .recognise import Source, recognise

__all__ = [
    "TARGETS",
    "Conversion",
    "Source",
    "check_checkpoint",
    "convert",
    "convert_file",
    "load_backbone",
    "read_checkpoint",
    "recognise",
    "tensors_for",
]
