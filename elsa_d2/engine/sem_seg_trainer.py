"""The trainer of segmentors, and the choice of a trainer for a config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from elsa_d2.config import is_sem_seg
from elsa_d2.data.sem_seg_mapper import SemSegMapper
from elsa_d2.evaluation.sem_seg import build_sem_seg_evaluator
from elsa_d2.modeling.sem_seg_tta import SegmentorWithTTA, at_test_ratios

from .trainer import Trainer, shielded


class SemSegTrainer(Trainer):
    """`Trainer` of a `SemanticSegmentor`, evaluated by IoU."""

    for_sem_seg = True
    mapper = SemSegMapper

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        return shielded(build_detection_train_loader(cfg, mapper=cls.mapper(cfg, True)))

    @classmethod
    def build_task_evaluator(cls, cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
        return build_sem_seg_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """As DefaultTrainer, at TEST.SEM_SEG_RATIOS."""
        return super().test(cfg, at_test_ratios(cfg, model), evaluators)

    @classmethod
    def with_tta(cls, cfg: CfgNode, model: nn.Module) -> tuple[CfgNode, nn.Module]:
        return cfg, SegmentorWithTTA(cfg, model)


def trainer_class(cfg: CfgNode) -> type[Trainer]:
    """Returns `SemSegTrainer` for a `SemanticSegmentor`, `Trainer` for other models."""
    return SemSegTrainer if is_sem_seg(cfg) else Trainer
