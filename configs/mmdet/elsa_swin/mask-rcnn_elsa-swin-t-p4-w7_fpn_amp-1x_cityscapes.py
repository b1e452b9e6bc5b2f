_base_ = [
    "../_base_/models/mask-rcnn_elsa-swin_fpn_cityscapes.py",
    "../_base_/datasets/cityscapes_instance.py",
    "../_base_/schedules/adamw_amp_1x_cityscapes.py",
    "../_base_/epoch_runtime.py",
]

model = dict(backbone=dict(arch="tiny", drop_path_rate=0.1))
