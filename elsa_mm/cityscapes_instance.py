"""Instances of Cityscapes, evaluated by cityscapesscripts, in MMDetection."""

from __future__ import annotations

from typing import Any

from mmdet.evaluation import CityScapesMetric
from mmengine.registry import METRICS

from elsa_core.runtime.packages import need

cityscapes_eval: Any = need("elsa_core.data.cityscapes_eval", "CityscapesInstanceScores")


@METRICS.register_module()
class CityscapesInstanceScores(CityScapesMetric):
    """CityScapesMetric that scores 0, instead of failing, when no prediction can be evaluated."""

    def compute_metrics(self, results: list) -> dict[str, Any]:
        """Average precisions, 0..1, of pairs of a true map and a file of predictions."""
        with cityscapes_eval.patched_evaluation(keep_matches=self.dump_matches):
            return super().compute_metrics(results)
