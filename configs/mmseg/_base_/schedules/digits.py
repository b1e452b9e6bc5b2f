# The cycle of own_data.py at twice its length.
_base_ = ["own_data.py"]

max_iters = 2000
warmup_iters = max_iters // 10
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warmup_iters),
    dict(type="CosineAnnealingLR", eta_min=0, by_epoch=False, begin=warmup_iters, end=max_iters),
]
train_cfg = dict(max_iters=max_iters)
