"""ELSA-Swin and ELSA-VOLO for OpenMMLab 2.x: importing this registers what our configs name.

A config imports it with `custom_imports = dict(imports=['elsa_mm'])`.
"""

from . import flops as _flops  # noqa: F401 (registers handles)
from .averaged_weights import AveragedWeightsHook
from .backbone import ELSASwin
from .checkpoint import AtomicLocalBackend
from .checkpoint_hook import StoppableCheckpointHook
from .configs import get_config_file
from .early_stop import PatienceHook
from .evaluation import AugmentedValLoop
from .loading import WeightsHook
from .optim_wrapper import CPUAmpOptimWrapper
from .optimizer_constructor import ELSAOptimWrapperConstructor
from .schedule import WarmupCosineLR
from .sizes import EqualSizesHook
from .strategy import ELSAFSDPStrategy
from .trackers import MLflowTracker, WandbTracker
from .volo import ELSAVolo, ELSAVoloTokens

__all__ = [
    "AtomicLocalBackend",
    "AugmentedValLoop",
    "AveragedWeightsHook",
    "CPUAmpOptimWrapper",
    "ELSAFSDPStrategy",
    "ELSAOptimWrapperConstructor",
    "ELSASwin",
    "ELSAVolo",
    "ELSAVoloTokens",
    "EqualSizesHook",
    "MLflowTracker",
    "PatienceHook",
    "StoppableCheckpointHook",
    "WandbTracker",
    "WarmupCosineLR",
    "WeightsHook",
    "get_config_file",
]
