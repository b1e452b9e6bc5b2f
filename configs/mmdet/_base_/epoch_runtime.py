# MMDetection's runtime with our hooks.
_base_ = ["mmdet::_base_/default_runtime.py", "hooks.py"]

default_hooks = {{_base_.hooks}}
