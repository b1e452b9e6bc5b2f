"""Semantic segmentation of Cityscapes, evaluated by cityscapesscripts, in MMSegmentation.

Configs name the metric as `elsa_mm.cityscapes.CityscapesScores`: MMDetection needs no
MMSegmentation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from mmengine.registry import METRICS
from mmseg.evaluation import CityscapesMetric

from elsa_core.runtime.packages import need

need("elsa_core.data.cityscapes_eval", "CityscapesScores")  # adapts it to any NumPy
scoring: Any = need(
    "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", "CityscapesScores"
)
SCORES = {
    "IoU": "averageScoreClasses",
    "iIoU": "averageScoreInstClasses",
    "IoU_sup": "averageScoreCategories",
    "iIoU_sup": "averageScoreInstCategories",
}


@METRICS.register_module()
class CityscapesScores(CityscapesMetric):
    """CityscapesMetric with all four scores, in percent and under Detectron2's names.

    IoU and iIoU are means over classes, "_sup" ones over categories. iIoU weights each instance
    equally.

    Args:
        output_dir: folder for the predicted label maps, which are removed unless `keep_results`.
            None: a temporary folder; runs on several machines need a shared one.
        options: CityscapesMetric's.
    """

    default_prefix = "cityscapes"

    def __init__(self, output_dir: str | None = None, **options: Any) -> None:
        self._own = tempfile.TemporaryDirectory(prefix="cityscapes_") if not output_dir else None
        super().__init__(self._own.name if self._own else output_dir, **options)
        self.prefix = options.get("prefix") or self.default_prefix

    def compute_metrics(self, results: Sequence[tuple[str, str]]) -> dict[str, float]:
        """Scores of pairs of a predicted and a true label map."""
        if self.format_only:
            return super().compute_metrics(results)
        scoring.args.evalInstLevelScore = True
        scoring.args.evalPixelAccuracy = False
        scoring.args.JSONOutput = scoring.args.colorized = False
        scoring.args.quiet = True
        predictions, truths = map(list, zip(*results, strict=True))
        found = scoring.evaluateImgLists(predictions, truths, scoring.args)
        return {name: 100 * float(found[key]) for name, key in SCORES.items()}
