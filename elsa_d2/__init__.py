"""ELSA-Swin and ELSA-VOLO in Detectron2: importing this package registers backbones and heads."""

from elsa_core.runtime.errors import UsageError

from . import flops as _flops  # noqa: F401 (registers handles)
from .checkpoint import AtomicCheckpointer
from .config import add_elsa_swin_config, get_config_file, load_config
from .data.cityscapes import register_cityscapes_datasets
from .data.coco import register_coco_datasets
from .data.mapper import DetectionMapper
from .data.sem_seg import register_sem_seg_datasets
from .data.sem_seg_mapper import SemSegMapper
from .engine.sem_seg_trainer import SemSegTrainer, trainer_class
from .engine.trainer import Trainer
from .evaluation.sem_seg import build_sem_seg_evaluator
from .modeling.backbone import ELSASwin, build_elsa_swin_backbone, build_elsa_swin_fpn_backbone
from .modeling.boxes import MMDetAnchorGenerator
from .modeling.cascade import ClassSpecificCascadeROIHeads
from .modeling.heads import Float32ROIAlign, MMDetBoxHead, MMDetMaskHead, MMDetROIHeads
from .modeling.proposals import MMDetRPN
from .modeling.sem_seg_tta import SegmentorWithTTA
from .modeling.tta import DetectionMapperTTA
from .modeling.upernet import UPerNetHead, WholeImageSegmentor
from .modeling.volo import ELSAVolo, build_elsa_volo_backbone, build_elsa_volo_fpn_backbone
from .predictor import Predictor
from .solver.lr_scheduler import build_lr_scheduler
from .solver.optimizer import build_optimizer, clip_total_norm, parameter_groups

__all__ = [
    "AtomicCheckpointer",
    "ClassSpecificCascadeROIHeads",
    "DetectionMapper",
    "DetectionMapperTTA",
    "ELSASwin",
    "ELSAVolo",
    "Float32ROIAlign",
    "MMDetAnchorGenerator",
    "MMDetBoxHead",
    "MMDetMaskHead",
    "MMDetROIHeads",
    "MMDetRPN",
    "Predictor",
    "SegmentorWithTTA",
    "SemSegMapper",
    "SemSegTrainer",
    "Trainer",
    "UPerNetHead",
    "UsageError",
    "WholeImageSegmentor",
    "add_elsa_swin_config",
    "build_elsa_swin_backbone",
    "build_elsa_swin_fpn_backbone",
    "build_elsa_volo_backbone",
    "build_elsa_volo_fpn_backbone",
    "build_lr_scheduler",
    "build_optimizer",
    "build_sem_seg_evaluator",
    "clip_total_norm",
    "get_config_file",
    "load_config",
    "parameter_groups",
    "register_cityscapes_datasets",
    "register_coco_datasets",
    "register_sem_seg_datasets",
    "trainer_class",
]
