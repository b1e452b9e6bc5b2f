"""Predicts with trained models, and draws and writes the results.

Neither framework is imported before a config says which one is needed.
"""

from .inferencer import Inferencer
from .load import load_exported, load_inferencer
from .results import Detections, Segmentation

__all__ = ["Detections", "Inferencer", "Segmentation", "load_exported", "load_inferencer"]
