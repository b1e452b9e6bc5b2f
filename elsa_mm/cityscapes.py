"""Semantic segmentation of Cityscapes as cityscapesscripts judges it, in MMSegmentation.

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

need("elsa_core.data.cityscapes_eval", "CityscapesScores")  # any NumPy does then
judge: Any = need("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", "CityscapesScores")
SCORES = {
    "IoU": "averageScoreClasses",
    "iIoU": "averageScoreInstClasses",
    "IoU_sup": "averageScoreCategories",
    "iIoU_sup": "averageScoreInstCategories",
}


@METRICS.register_module()
class CityscapesScores(CityscapesMetric):
    """CityscapesMetric with all four scores, in percent and under Detectron2's names.

    IoU and iIoU are means over classes, those that end in "_sup" over categories; iIoU weighs each
    instance alike.

    Args:
        output_dir: for the predicted label maps, of which nothing is kept unless `keep_results`;
            None: a temporary folder of this process. Several machines need one that all of them
            can read.
        options: CityscapesMetric's.
    """

    default_prefix = "cityscapes"

    def __init__(self, output_dir: str | None = None, **options: Any) -> None:
        self._own = tempfile.TemporaryDirectory(prefix="cityscapes_") if not output_dir else None
        super().__init__(output_dir or self._own.name, **options)
        self.prefix = options.get("prefix") or self.default_prefix

    def compute_metrics(self, results: Sequence[tuple[str, str]]) -> dict[str, float]:
        """Scores of pairs of a predicted and a true label map."""
        if self.format_only:
            return super().compute_metrics(results)
        judge.args.evalInstLevelScore = True
        judge.args.evalPixelAccuracy = False
        judge.args.JSONOutput = judge.args.colorized = False
        judge.args.quiet = True
        predictions, truths = map(list, zip(*results, strict=True))
        found = judge.evaluateImgLists(predictions, truths, judge.args)
        return {name: 100 * float(found[key]) for name, key in SCORES.items()}
