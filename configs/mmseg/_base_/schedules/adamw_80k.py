# MMSegmentation's 80k iterations, for 8 images at a time; the rate's law is that of 160k, as there
# is no published recipe.
_base_ = ["adamw_160k.py"]

train_cfg = dict(max_iters=80000, val_interval=8000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=0, end=80001),
]
default_hooks = dict(checkpoint=dict(interval=8000))
auto_scale_lr = dict(base_batch_size=8)
