# Mask R-CNN for the 8 classes of Cityscapes that have instances.
_base_ = ["mask-rcnn_elsa-swin_fpn.py"]

model = dict(roi_head=dict(bbox_head=dict(num_classes=8), mask_head=dict(num_classes=8)))
