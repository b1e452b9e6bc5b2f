"""Registers ELSA-Swin's operators with fvcore's counters, which Detectron2 uses."""

import importlib

from elsa_core.flop_handles import ACTIVATIONS, MULTIPLY_ADDS, register_handles

# By their names: fvcore.nn has functions that are called as these modules are.
for _name, _handles in {"flop_count": MULTIPLY_ADDS, "activation_count": ACTIVATIONS}.items():
    register_handles(importlib.import_module(f"fvcore.nn.{_name}"), _DEFAULT_SUPPORTED_OPS=_handles)
