"""Results by class: what a trained model gets right and wrong, as numbers, tables and pictures."""

from .analysis import Analysis, ClassResult, Confusion, ImageResult, Shape
from .run import Rule, Run

__all__ = ["Analysis", "ClassResult", "Confusion", "ImageResult", "Rule", "Run", "Shape"]
