"""ELSA-Swin in Detectron2: importing this package registers the backbones."""

from elsa_core.errors import UsageError

from .backbone import ELSASwin, build_elsa_swin_backbone, build_elsa_swin_fpn_backbone
from .checkpoint import AtomicCheckpointer
from .config import add_elsa_swin_config, load_config
from .data import register_coco_datasets
from .optimizer import build_optimizer
from .trainer import Trainer

__all__ = [
    "AtomicCheckpointer",
    "ELSASwin",
    "Trainer",
    "UsageError",
    "add_elsa_swin_config",
    "build_elsa_swin_backbone",
    "build_elsa_swin_fpn_backbone",
    "build_optimizer",
    "load_config",
    "register_coco_datasets",
]
