# The published 300 epochs of 1024 images and 10 more at the last rate, in mixed precision: AdamW at
# 1e-3, weight decay 0.05, 20 epochs of warm-up from 1e-6, a cosine to 1e-5 that is counted from the
# first epoch; the rate is constant within an epoch. Parameters of one dimension (biases, norms) are
# not decayed; ghost filters and position biases are. Gradients are clipped.
# The path is explained in models/elsa-swin_224.py.
_base_ = [
    f"{__import__('mmpretrain').__path__[0]}/.mim/configs/_base_/schedules/"
    "imagenet_bs1024_adamw_swin.py"
]

optim_wrapper = dict(
    type="AmpOptimWrapper",
    constructor="ELSAOptimWrapperConstructor",
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="WarmupCosineLR", T_max=300, eta_min=1e-5, warmup=20, warmup_lr=1e-6, by_epoch=True)
]
train_cfg = dict(max_epochs=310)
