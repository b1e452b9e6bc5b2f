# A reconstruction: no official weights exist.
_base_ = [
    "../_base_/models/elsa-volo_224.py",
    "../_base_/datasets/imagenet_bs128_elsa-volo_224.py",
    "../_base_/schedules/adamw_300e_volo.py",
    "../_base_/epoch_runtime.py",
]

# VOLO's repository has no rate and no drop path for D4 and D5: those of D3 are a decision.
model = dict(backbone=dict(arch="volo_d5", drop_path_rate=0.5), head=dict(in_channels=768))
