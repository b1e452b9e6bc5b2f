# One cycle of AdamW, counted in iterations.
_base_ = ["../../../mmdet/_base_/schedules/undecayed.py"]

max_iters = 1000
max_lr = 2e-3

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=max_lr, betas=(0.9, 0.99), weight_decay=0.05),
    constructor="ELSAOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys={{_base_.undecayed}}),
)
warmup_iters = max_iters // 10
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warmup_iters),
    dict(type="CosineAnnealingLR", eta_min=0, by_epoch=False, begin=warmup_iters, end=max_iters),
]

train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=500)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
