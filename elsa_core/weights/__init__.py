"""Read, recognise and convert checkpoints of ELSA-Swin and ELSA-VOLO with torch alone."""

from .channels import fit_channels
from .convert import TARGETS, Conversion, convert
from .files import checkpoint_for, convert_file, load_backbone
from .fit import attention_names, check_complete, check_names, coverage, fit_positions, has_names_of
from .read import forget_ahead, read_ahead, read_checkpoint
from .recognise import recognise
from .source import Source
from .write import class_names

__all__ = [
    "TARGETS",
    "Conversion",
    "Source",
    "attention_names",
    "check_complete",
    "check_names",
    "checkpoint_for",
    "class_names",
    "convert",
    "convert_file",
    "coverage",
    "fit_channels",
    "fit_positions",
    "has_names_of",
    "load_backbone",
    "forget_ahead",
    "read_ahead",
    "read_checkpoint",
    "recognise",
]
