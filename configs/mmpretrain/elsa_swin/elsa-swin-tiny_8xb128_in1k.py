_base_ = [
    "../_base_/models/elsa-swin_224.py",
    "../_base_/datasets/imagenet_bs128_elsa-swin_224.py",
    "../_base_/schedules/adamw_300e.py",
    "../_base_/epoch_runtime.py",
]

model = dict(backbone=dict(arch="tiny", drop_path_rate=0.1))
