# MMSegmentation's runtime; its schedules count iterations and bring the hooks, this one too.
# The path is explained in models/upernet_elsa-swin.py.
_base_ = [f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/default_runtime.py"]

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="StoppableCheckpointHook",
        by_epoch=False,
        interval=100,
        max_keep_ckpts=2,
        backend_args=dict(backend="atomic_local"),
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
    sizes=dict(type="EqualSizesHook"),
    weights=dict(type="WeightsHook"),
)
log_processor = dict(window_size=20)
