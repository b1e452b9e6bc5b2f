# A reconstruction: no official weights exist. The rate of drop path is VOLO's for ImageNet, a
# decision.
_base_ = [
    "../_base_/models/upernet_elsa-volo_ade20k.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k_ade20k.py",
]

model = dict(backbone=dict(arch="volo_d1", drop_path_rate=0.1))
