# MMDetection's runtime; checkpoints are written whole or not at all, the last 3 are kept, and a
# scheduler's signal saves one more.
_base_ = ["mmdet::_base_/default_runtime.py"]

default_hooks = dict(
    checkpoint=dict(
        type="StoppableCheckpointHook",
        max_keep_ckpts=3,
        backend_args=dict(backend="atomic_local"),
    ),
    sizes=dict(type="EqualSizesHook"),
    weights=dict(type="WeightsHook"),
)
