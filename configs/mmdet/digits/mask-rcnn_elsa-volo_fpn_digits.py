_base_ = [
    "../_base_/models/mask-rcnn_elsa-volo_fpn_small.py",
    "../_base_/datasets/digits_instance.py",
    "../_base_/schedules/own_data.py",
    "../_base_/iteration_runtime.py",
]

model = dict(roi_head=dict(bbox_head=dict(num_classes=10), mask_head=dict(num_classes=10)))
randomness = dict(seed=0)
