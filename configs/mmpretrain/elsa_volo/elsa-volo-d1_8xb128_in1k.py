# A reconstruction: no official weights exist.
_base_ = [
    "../_base_/models/elsa-volo_224.py",
    "../_base_/datasets/imagenet_bs128_elsa-volo_224.py",
    "../_base_/schedules/adamw_300e_volo.py",
    "../_base_/epoch_runtime.py",
]

model = dict(backbone=dict(arch="volo_d1", drop_path_rate=0.1))
optim_wrapper = dict(optimizer=dict(lr=1.6e-3))
