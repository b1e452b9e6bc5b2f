_base_ = [
    "../_base_/models/upernet_elsa-swin_cityscapes.py",
    "../_base_/datasets/cityscapes.py",
    "../_base_/schedules/adamw_80k.py",
]

model = dict(backbone=dict(arch="small", drop_path_rate=0.3))
