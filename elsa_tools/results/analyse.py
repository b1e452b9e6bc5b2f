"""Results by class of any task, from files of either framework."""

from __future__ import annotations

from collections.abc import Sequence

from .analysis import Analysis
from .detections import analyse_detections
from .label_maps import analyse_label_maps
from .read import read_results


def analyse(
    annotations: str,
    results: str,
    task: str,
    *,
    classes: Sequence[str] | None = None,
    images: str | None = None,
    reduce_zero_label: bool = False,
) -> Analysis:
    """Analyse a results file of either framework, or predicted label maps.

    Args:
        annotations: COCO file, or folder of label maps.
        results: COCO results; or folder of label maps or Detectron2's sem_seg_predictions.json.
        task: "bbox", "segm" or "semantic".
        classes: names by label, needed for label maps; see `detections.analyse_detections`.
        images, reduce_zero_label: see `label_maps.analyse_label_maps`.

    Raises:
        UsageError: annotations and results do not fit, or are damaged.
    """
    if task != "semantic":
        return analyse_detections(annotations, read_results(results), task, classes=classes)
    return analyse_label_maps(
        annotations, results, classes or (), images=images, reduce_zero_label=reduce_zero_label
    )
