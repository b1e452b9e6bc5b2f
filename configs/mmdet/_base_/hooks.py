# Checkpoints are written whole or not at all, the last 3 are kept, and a scheduler's signal saves
# one more. A variable, because a config's bases must have different keys.
hooks = dict(
    checkpoint=dict(
        type="StoppableCheckpointHook",
        max_keep_ckpts=3,
        backend_args=dict(backend="atomic_local"),
    ),
    sizes=dict(type="EqualSizesHook"),
    weights=dict(type="WeightsHook"),
)
