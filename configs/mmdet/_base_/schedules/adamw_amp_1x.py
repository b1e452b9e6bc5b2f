# MMDetection's 12 epochs, with AdamW in mixed precision and without clipping. Names that contain
# "norm" are the backbone's alone: normalisation layers of the heads are called "bn" and decayed.
# The warm-up ends at 501, because LinearLR reaches the full rate an iteration before its end.
_base_ = ["undecayed.py", "mmdet::_base_/schedules/schedule_1x.py"]

optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="ELSAOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys={{_base_.undecayed}}),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=501),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
