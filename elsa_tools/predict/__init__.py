"""Trained models at work: pictures and results for people, ONNX files for other programs.

Neither framework is imported before a config says which one is needed.
"""

from .load import load_predictor
from .predictor import Predictor
from .results import Instances, Segmentation

__all__ = ["Instances", "Predictor", "Segmentation", "load_predictor"]
