_base_ = [
    "../_base_/models/elsa-swin_224.py",
    "../_base_/datasets/imagenet_bs128_elsa-swin_224.py",
    "../_base_/schedules/adamw_300e.py",
    "../_base_/epoch_runtime.py",
]

model = dict(backbone=dict(arch="base", drop_path_rate=0.5), head=dict(in_channels=1024))
# Averaged weights (decay 0.99992) are evaluated, and are the checkpoint's state_dict.
custom_hooks = [dict(type="EMAHook", momentum=8e-5)]
