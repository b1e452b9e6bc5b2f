"""The evaluation of Cityscapes, by cityscapesscripts."""

from __future__ import annotations

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    DatasetEvaluator,
)

from elsa_d2.data.cityscapes import INSTANCES, SEM_SEG, provide_cityscapesscripts


class InstanceEvaluator(CityscapesInstanceEvaluator):
    """Detectron2's, but scores predictions in ignored areas alone as 0 instead of failing."""

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """AP and AP50 of masks in percent; None in processes other than the first."""
        from elsa_core.data.cityscapes_eval import patched_evaluation

        with patched_evaluation():
            return super().evaluate()


EVALUATORS = {INSTANCES: InstanceEvaluator, SEM_SEG: CityscapesSemSegEvaluator}


def build_cityscapes_evaluator(name: str) -> DatasetEvaluator:
    """Returns Detectron2's evaluator: AP of masks, or IoU of classes and categories, in percent."""
    provide_cityscapesscripts()
    import elsa_core.data.cityscapes_eval  # noqa: F401 (any NumPy does then)

    return EVALUATORS[MetadataCatalog.get(name).evaluator_type](name)
