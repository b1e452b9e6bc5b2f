"""ELSA-Swin in Detectron2: importing this package registers the backbones and the heads."""

from elsa_core.runtime.errors import UsageError

from . import flops as _flops  # noqa: F401 (registers handles)
from .backbone import ELSASwin, build_elsa_swin_backbone, build_elsa_swin_fpn_backbone
from .boxes import MMDetAnchorGenerator
from .cascade import ClassSpecificCascadeROIHeads
from .checkpoint import AtomicCheckpointer
from .cityscapes import register_cityscapes_datasets
from .config import add_elsa_swin_config, load_config
from .data import register_coco_datasets
from .heads import Float32ROIAlign, MMDetBoxHead, MMDetMaskHead, MMDetROIHeads
from .mapper import DetectionMapper, Predictor
from .optimizer import build_optimizer
from .proposals import MMDetRPN
from .schedule import build_lr_scheduler
from .semantic import SegmentorWithTTA, SemanticMapper, build_sem_seg_evaluator
from .semantic_data import register_sem_seg_datasets
from .trainer import Trainer
from .tta import DetectionMapperTTA
from .upernet import UPerNetHead, WholeImageSegmentor
from .zoo import get_config_file

__all__ = [
    "AtomicCheckpointer",
    "ClassSpecificCascadeROIHeads",
    "DetectionMapper",
    "DetectionMapperTTA",
    "ELSASwin",
    "Float32ROIAlign",
    "MMDetAnchorGenerator",
    "MMDetBoxHead",
    "MMDetMaskHead",
    "MMDetROIHeads",
    "MMDetRPN",
    "Predictor",
    "SegmentorWithTTA",
    "SemanticMapper",
    "Trainer",
    "UPerNetHead",
    "UsageError",
    "WholeImageSegmentor",
    "add_elsa_swin_config",
    "build_elsa_swin_backbone",
    "build_elsa_swin_fpn_backbone",
    "build_lr_scheduler",
    "build_optimizer",
    "build_sem_seg_evaluator",
    "get_config_file",
    "load_config",
    "register_cityscapes_datasets",
    "register_coco_datasets",
    "register_sem_seg_datasets",
]
