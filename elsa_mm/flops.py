"""Makes MMEngine's counters, which OpenMMLab's get_flops.py use, know our operators."""

from mmengine.analysis import complexity_analysis

from elsa_core.flop_handles import ACTIVATIONS, MULTIPLY_ADDS, register_handles

register_handles(
    complexity_analysis,
    _DEFAULT_SUPPORTED_FLOP_OPS=MULTIPLY_ADDS,
    _DEFAULT_SUPPORTED_ACT_OPS=ACTIVATIONS,
)
