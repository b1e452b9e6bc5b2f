# MMPretrain's runtime; checkpoints are written whole or not at all, the last 3 and the one of the
# highest top-1 accuracy are kept, and a scheduler's signal saves one more. Each process adds its
# rank to the seed.
# The path is explained in models/elsa-swin_224.py.
_base_ = [f"{__import__('mmpretrain').__path__[0]}/.mim/configs/_base_/default_runtime.py"]

default_hooks = dict(
    checkpoint=dict(
        type="StoppableCheckpointHook",
        max_keep_ckpts=3,
        save_best="accuracy/top1",
        rule="greater",
        backend_args=dict(backend="atomic_local"),
    ),
    weights=dict(type="WeightsHook"),
)
randomness = dict(seed=42, diff_rank_seed=True)
