# MMDetection's runtime for trainings that are counted in iterations.
_base_ = ["mmdet::_base_/default_runtime.py"]

default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=False),
    checkpoint=dict(
        type="StoppableCheckpointHook",
        by_epoch=False,
        interval=100,
        max_keep_ckpts=2,
        backend_args=dict(backend="atomic_local"),
    ),
    sizes=dict(type="EqualSizesHook"),
    weights=dict(type="WeightsHook"),
)
log_processor = dict(by_epoch=False, window_size=20)
