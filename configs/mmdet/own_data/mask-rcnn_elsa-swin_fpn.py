# A small Mask R-CNN to begin with on data of one's own (docs/own-dataset.md), from random weights.
# Data sets and num_classes are the user's.
_base_ = [
    "../_base_/models/mask-rcnn_elsa-swin_fpn_own_data.py",
    "../_base_/datasets/own_instance.py",
    "../_base_/schedules/own_data.py",
    "../_base_/iteration_runtime.py",
]
