_base_ = [
    "../_base_/models/cascade-mask-rcnn_elsa-swin_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/adamw_amp_1x.py",
    "../_base_/epoch_runtime.py",
]

model = dict(backbone=dict(arch="tiny", drop_path_rate=0.0))
