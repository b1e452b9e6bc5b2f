# MMSegmentation's 160k iterations and runtime, with AdamW. The rate falls from iteration 0 on,
# times the warm-up; the ends are one more, because LinearLR and PolyLR reach their last value an
# iteration before them. Checkpoints are written whole or not at all, the last 3 are kept. The paths
# are explained in models/upernet_elsa-swin.py.
_base_ = [
    "../../../mmdet/_base_/schedules/undecayed.py",
    f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/default_runtime.py",
    f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/schedules/schedule_160k.py",
]

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    constructor="ELSAOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys={{_base_.undecayed}}),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=0, end=160001),
]
default_hooks = dict(
    checkpoint=dict(
        type="StoppableCheckpointHook",
        max_keep_ckpts=3,
        backend_args=dict(backend="atomic_local"),
    ),
    sizes=dict(type="EqualSizesHook"),
    weights=dict(type="WeightsHook"),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
