# The cycle of own_data.py for heads that match queries to objects: slower, longer, and clipped.
_base_ = ["own_data.py"]

max_iters = 3000
max_lr = 1e-3
warmup_iters = 100
optim_wrapper = dict(optimizer=dict(lr=max_lr), clip_grad=dict(max_norm=0.1))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warmup_iters),
    dict(type="CosineAnnealingLR", eta_min=0, by_epoch=False, begin=warmup_iters, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=500)
