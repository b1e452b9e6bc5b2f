# MMPretrain's runtime; checkpoints are written whole or not at all, the last 3 are kept, and a
# scheduler's signal saves one more.
# The path is explained in models/elsa-swin_224.py.
_base_ = [f"{__import__('mmpretrain').__path__[0]}/.mim/configs/_base_/default_runtime.py"]

default_hooks = dict(
    checkpoint=dict(
        type="StoppableCheckpointHook",
        max_keep_ckpts=3,
        backend_args=dict(backend="atomic_local"),
    ),
)
