# A reconstruction: no official weights exist. The rate of drop path is VOLO's for ImageNet, a
# decision.
_base_ = [
    "../_base_/models/mask-rcnn_elsa-volo_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/adamw_amp_3x.py",
    "../_base_/epoch_runtime.py",
]

model = dict(backbone=dict(arch="volo_d1", drop_path_rate=0.1))
