"""Detectron2's mean IoU for label maps of any bit depth."""

from __future__ import annotations

import os

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from elsa_d2.data.safe_loading import read_labels

from .files import PREFIX


def build_sem_seg_evaluator(
    cfg: CfgNode, dataset_name: str, folder: str = "inference"
) -> SemSegEvaluator:
    """Returns Detectron2's mean IoU, without classes that no label map has."""
    metadata = MetadataCatalog.get(dataset_name)

    def load(path: str, dtype: type) -> np.ndarray:
        reduce = metadata.get("reduce_zero_label", False)
        return read_labels(path, len(metadata.stuff_classes), reduce).astype(dtype)

    return SemSegEvaluator(
        dataset_name,
        output_dir=PREFIX + os.path.join(cfg.OUTPUT_DIR, folder),
        sem_seg_loading_fn=load,
    )
